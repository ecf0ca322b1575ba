"""Models that are tables: every prediction of every sample is set by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from expunge.core.audit import Subject
from expunge.core.data import Data
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.problems.causal_lm import CausalLM
from expunge.problems.classification import Classification
from expunge.problems.tokens import TokenData, Tokens
from expunge.suite import checks


class Table(nn.Module):
    """Row x of the table is the prediction for input x."""

    def __init__(self, logits):
        super().__init__()
        self.rows = nn.Parameter(logits.float())

    def forward(self, x):
        return self.rows[x[:, 0].long()]


@pytest.fixture
def tables():
    """`tables(y, y_test, request, original, *others)` gives one subject a table of logits.

    Rows are training samples, then test samples. `order` permutes how they are stored.
    """

    def make(y, y_test, request, *logits, order=None, order_test=None, runtime=None):
        n, m = len(y), 0 if y_test is None else len(y_test)
        x = torch.arange(n + m).float()[:, None]
        order = torch.arange(n) if order is None else order
        train = Data((x[:n][order], torch.as_tensor(y)[order]), ids=order)
        test = None
        if m:
            order_test = torch.arange(m) if order_test is None else order_test
            test = Data((x[n:][order_test], torch.as_tensor(y_test)[order_test]), ids=order_test)
        problem = Classification(Table(logits[0]), train, test)
        runtime = runtime or Runtime()
        return [Subject(Table(rows), problem, request, runtime) for rows in logits]

    return make


@pytest.fixture
def by_name():
    return lambda findings: {f.name: f for f in findings}


@pytest.fixture
def margins():
    """Two-class logits whose log-odds for the true class are given."""

    def make(labels, odds):
        logits = torch.zeros(len(labels), 2)
        logits[torch.arange(len(labels)), torch.as_tensor(labels)] = torch.as_tensor(odds).float()
        return logits

    return make


@pytest.fixture
def some_ids():
    return lambda n: Request(ids=tuple(range(n)))


class Sheet(nn.Module):
    """A language model that is a table: the first token of a sequence says which sheet is read.

    Position t of sheet n is `logits[n, t]`, whatever the other tokens are; token 2 ends a text.
    """

    def __init__(self, logits):
        super().__init__()
        self.sheets = nn.Parameter(logits)
        self.config = SimpleNamespace(eos_token_id=2)

    def forward(self, input_ids, attention_mask):
        return self.sheets[input_ids[:, 0], : input_ids.shape[1]]


@pytest.fixture
def sheets():
    """`sheets(rows, test, request, *logits)` gives one subject a table [n + m, T, V] of logits.

    A row is (ids after the first, length of the prompt); its first token is its number, counted
    through training and test rows. `order` permutes how training rows are stored, which keep their ids.
    """

    def tokens(number, row):
        rest, prompt = row
        ids = torch.tensor([number, *rest])
        return Tokens(ids, torch.arange(len(ids)) >= prompt)

    def make(rows, test, request, *logits, order=None, alternates=None, tokenizer=None):
        order = list(range(len(rows))) if order is None else order
        others = None
        if alternates is not None:
            others = [[tokens(n, a) for a in alternates[n]] for n in order]
        train = TokenData([tokens(n, rows[n]) for n in order], ids=order, alternates=others)
        held = None
        if test:
            held = TokenData([tokens(len(rows) + n, row) for n, row in enumerate(test)])
        problem = CausalLM(Sheet(logits[0]), train, held, tokenizer=tokenizer)
        return [Subject(Sheet(table), problem, request, Runtime()) for table in logits]

    return make


@pytest.fixture(scope="session")
def facts():
    """Subjects of the quick language-model workload: the original and two retrained models."""
    return checks._subjects("causal-lm")

"""Invariant 8 of the card baselines-llm, for every method of methods/text that has a forget loss.

Positions that predict no answered token get no gradient, and padding on either side changes nothing.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import expunge as xp
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods import registry
from expunge.problems.causal_lm import CausalLM
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.text import Text, TextTraining
from expunge.train.token_losses import IGNORED


def has_forget_loss(name):
    cls = registry.get(name)
    return issubclass(cls, TextTraining) and cls.forget_loss is not TextTraining.forget_loss


OWN = ("concept-mask",)
"""Its loss is of answers that it makes first, of new sequences: see `test_concept_mask.py`."""
NAMES = [name for name in registry if has_forget_loss(name) and name not in OWN]
SETTINGS = {
    "code-eraser": {"spans": "all"},
    "idk-dpo": {"refusals": ("7 8 9", "4 5")},
    "rmu": {"layer": 1},
}
"""What a method must be told here, where there is no tokenizer and a model of two blocks."""


class Padded(TokenData):
    """Pads with so many further columns, on the right or on the left."""

    def __init__(self, rows, extra=0, left=False, **more):
        self.extra, self.left = extra, left
        super().__init__(rows, **more)

    def _batch(self, rows, ids):
        batch = super()._batch(rows, ids)
        batch.x.update({k: self._moved(v, rows, 0) for k, v in batch.x.items()})
        return batch.labelled(self._moved(batch.y, rows, IGNORED))

    def marks(self, ids, width):
        rows = [self.rows[p] for p in self.positions(ids).tolist()]
        return self._moved(super().marks(ids, width - self.extra), rows, False)

    def _moved(self, values, rows, filler):
        wide = torch.nn.functional.pad(values, (0, self.extra), value=filler)
        if not self.left:
            return wide
        width = wide.shape[1]
        return torch.stack([r.roll(width - len(t)) for r, t in zip(wide, rows, strict=True)])


class Watched(CausalLM):
    """Keeps logits, and outputs of blocks, that a loss with gradients asked for."""

    def _padded_logits(self, model, batch, **more):
        columns = more.get("logits_to_keep", slice(None))
        return self._seen(batch, super()._padded_logits(model, batch, **more), columns)

    def tapped(self, model, batch, layers):
        logits, found = super().tapped(model, batch, layers)
        return logits, {n: self._seen(batch, f) for n, f in found.items()}

    def _seen(self, batch, values, columns=slice(None)):
        if values.requires_grad:
            values.retain_grad()
            self.__dict__.setdefault("seen", []).append((batch, values, columns))
        return values


def loss_of(name, build, rows, **padding):
    """The loss of three forget samples, with its problem and the gradients of a model."""
    others = [[row_with(r, 5), row_with(r, 11)] for r in rows]
    problem = Watched(build(0), Padded(rows, alternates=others, **padding))
    method = registry.get(name)(**SETTINGS.get(name, {}))
    if method.needs.original:  # a cache is tested where references are
        method = dataclasses.replace(method, reference="copy")
    runtime = Runtime(seed=0)
    view = View(problem, xp.forget(ids=[0, 1, 2]), method.needs, runtime)
    text = Text(view, runtime, method.original(view, view.model()))
    model = build(1)
    loss = method.forget_loss(model, view.forget.fetch(torch.arange(3)), text)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), gradients, problem


def row_with(row, shift):
    """The same prompt with another answer of one token more."""
    answer = torch.cat([(row.answer + shift) % 37 + 3, torch.tensor([2])])
    ids = torch.cat([row.prompt, answer])
    return Tokens(ids, torch.arange(len(ids)) >= len(row.prompt))


def test_the_methods_are_found():
    wanted = {"npo", "grad-diff", "kl-min", "simnpo", "wga", "satimp", "ceu", "undial"}
    assert wanted <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_baselines_llm_invariant_8_no_gradient_from_what_is_not_answered(name, build, tiny_rows):
    _, gradients, problem = loss_of(name, build, tiny_rows, extra=2)
    assert max(float(g.abs().max()) for g in gradients) > 0
    seen = [(b, z, c) for b, z, c in problem.seen if z.grad is not None]
    reached = 0.0
    for batch, values, columns in seen:
        ignored = torch.ones(batch.y.shape, dtype=torch.bool)
        ignored[:, :-1] = batch.y[:, 1:] == IGNORED
        assert int(ignored.sum()) > 3 + 6 and not bool(ignored.all())
        ignored = ignored[:, columns]
        assert not bool(values.grad[ignored].any())
        reached = max(reached, float(values.grad[~ignored].abs().max()))
    assert reached > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "padding", [{"extra": 3}, {"left": True}, {"left": True, "extra": 2}], ids=str
)
def test_baselines_llm_invariant_8_padding_on_either_side_changes_nothing(
    name, padding, build, tiny_rows
):
    wanted, gradients, _ = loss_of(name, build, tiny_rows)
    found, others, _ = loss_of(name, build, tiny_rows, **padding)
    assert found == pytest.approx(wanted, abs=1e-5)
    for mine, theirs in zip(others, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)

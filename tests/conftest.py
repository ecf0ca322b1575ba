"""Fixtures shared by all tests: one thread, the digits problem, tiny networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.core.request import Request
from expunge.problems.classification import Classification
from expunge.suite.checks import bench_problem, bench_reference


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> Classification:
    return bench_problem()


@pytest.fixture(scope="session")
def digits_reference() -> nn.Module:
    return bench_reference()


@pytest.fixture
def threes() -> Request:
    return Request(label=(3,))

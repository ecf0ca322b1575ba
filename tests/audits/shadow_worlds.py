"""Worlds in which log-odds are drawn by hand: hard and easy samples, and what seeing one adds."""

from __future__ import annotations

import numpy as np
import torch

from expunge.core.request import Request
from expunge.fleet.shadows import Shadows


class World:
    """`n` training samples of which the first `forget` are to be forgotten, and `m` test samples.

    A model's log-odds of a sample are its difficulty (standard deviation `hard`), `gain` if the model
    saw it, and noise of standard deviation 1.
    """

    def __init__(self, tables, margins, forget=60, n=160, m=200, models=32, gain=2.0, hard=4.0, seed=0, both=True):  # fmt: skip
        self.rng = np.random.default_rng(seed)
        self.tables, self.margins, self.gain, self.m = tables, margins, gain, m
        self.forget, self.n = forget, n
        self.y = self.rng.integers(0, 2, n + m)
        self.hard = self.rng.normal(0, hard, n + m)
        masks = self.rng.random((models, n + m)).argsort(1) < (n + m) // 2
        odds = self.hard + gain * masks + self.rng.normal(size=masks.shape)
        if not both:
            odds[:, n:] = self.hard[n:] + self.rng.normal(size=(models, m))
        self.shadows = Shadows(
            torch.from_numpy(masks), torch.from_numpy(odds).float(),
            torch.arange(n), torch.arange(m), both,
        )  # fmt: skip

    def logits(self, forgotten=0.0, seen=True):
        """A model's logits; `forgotten` is what having seen them adds to samples to forget."""
        odds = self.hard + self.rng.normal(size=self.n + self.m)
        odds[: self.forget] += forgotten
        odds[self.forget : self.n] += self.gain * seen
        return self.margins(self.y, odds)

    def subjects(self, *logits, request=None):
        """One subject a model; the first is the original."""
        request = request or Request(ids=tuple(range(self.forget)))
        return self.tables(self.y[: self.n], self.y[self.n :], request, *logits)

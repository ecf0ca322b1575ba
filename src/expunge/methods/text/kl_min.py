r"""KLMin: ascent on what is to be forgotten, while the rest is answered as before.

\[
L = -\gamma\, \mathrm{mean}_{t \in D_f}\, \ell_t
    + \alpha\, \mathrm{mean}_{t \in D_r}\, KL\big(p_{\theta_0}(\cdot \mid y_{<t})\,\|\,p_\theta(\cdot \mid y_{<t})\big)
\]

Not bounded below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.core.needs import Card, Deviation
from expunge.core.settings import setting
from expunge.methods.text.grad_diff import GradDiff
from expunge.train.text import PACE, Retain


@dataclass(frozen=True, kw_only=True)
class KLMin(GradDiff):
    """The forget term of GradDiff beside the divergence from the original on retain answers."""

    name: ClassVar[str] = "kl-min"
    card: ClassVar[Card] = Card(
        title="TOFU: A Task of Fictitious Unlearning for LLMs",
        authors="Maini, Feng, Schwarzschild, Lipton, Kolter",
        year=2024,
        link="https://arxiv.org/abs/2401.06121",
        idea="Raise the loss of what is to be forgotten and stay close to the original elsewhere.",
        deviations=(
            Deviation(
                "The divergence is a mean over the tokens of answers; the paper's runs over questions "
                "too, and OpenUnlearning's over padding as well.",
                "tests/methods/text/test_grad_diff.py::test_kl_min_compares_answers_only",
            ),
            PACE,
        ),
    )

    retain: Retain = setting("kl", "retain term: nll, kl to the original, or none", source="TOFU")

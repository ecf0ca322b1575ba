"""RMU: invariant 6 of the card baselines-llm, its losses from the formula, and the choice of blocks."""

from __future__ import annotations

import pytest
import torch

import expunge as xp
from expunge.core.errors import SettingError
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.text.rmu import RMU, direction
from expunge.problems.causal_lm import CausalLM
from expunge.train.text import Text
from expunge.workloads.tinyfacts import splits, tiny_llama

FORGET = xp.forget(where="entity < 2")
HERE = {"layer": 1, "train": "full", "scale": 3.0}


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return CausalLM(tiny_llama(16, 3), splits().train)


def text_of(problem):
    method = RMU(**HERE)
    return Text(View(problem, FORGET, method.needs, Runtime()), Runtime(), None)


def states(model, rows):
    """Outputs of block 1 where each answered token is predicted, sequence by sequence."""
    found = []
    for row in rows:
        hidden = model(input_ids=row.ids[None], output_hidden_states=True).hidden_states
        # the last entry is behind the final norm, so block 1 of 2 is read by its own layer
        inside = model.model.layers[1](
            hidden[1], position_embeddings=model.model.rotary_emb(hidden[1], torch.arange(len(row))[None]),
            attention_mask=torch.full((1, 1, len(row), len(row)), -1e9).triu(1).to(hidden[1]),
        )  # fmt: skip
        inside = inside[0] if isinstance(inside, tuple) else inside
        found.append(inside.reshape(len(row), -1)[row.answered.nonzero()[:, 0] - 1])
    return torch.cat(found).detach()


def test_losses_are_their_formulas(tiny, losses, build):
    model, method = build(1), RMU(**HERE)
    forget, retain = losses(method, model)
    mine, theirs = (states(m, tiny.train.rows[:3]) for m in (model, tiny.model))
    u = direction(mine.shape[1], Runtime())
    assert float(forget.detach()) == pytest.approx(float((mine - 3 * u).square().mean()), rel=1e-5)
    assert float(retain.detach()) == pytest.approx(float((mine - theirs).square().mean()), rel=1e-5)
    assert float(retain.detach()) > 1e-3


def test_baselines_llm_invariant_6_the_retain_term_is_zero_at_the_start(problem):
    outcome = xp.unlearn(problem, FORGET, RMU(**HERE, epochs=4, lr=1e-2, alpha=1))
    retain = outcome.details["losses"]["retain"]
    assert retain[0] == pytest.approx(0, abs=1e-9) and retain[-1] > 1e-6
    forget = outcome.details["losses"]["forget"]
    assert forget[-1] < 0.9 * forget[0]


@pytest.mark.parametrize(
    ("train", "moved"),
    [
        ("role(mlp out, 0-1)", {0, 1}),
        ("role(mlp out, 1)", {1}),
        ("role(mlp out)", {0, 1}),  # block 2 gets no gradient from the states of block 1
    ],
)
def test_baselines_llm_invariant_6_only_chosen_parameters_change(problem, train, moved):
    method = RMU(**{**HERE, "train": train}, epochs=2, lr=1e-2, weight_decay=0.1, reference="copy")
    after = xp.unlearn(problem, FORGET, method).runnable().state_dict()
    changed = {n for n, v in problem.model.state_dict().items() if not torch.equal(v, after[n])}
    assert changed == {f"model.layers.{n}.mlp.down_proj.weight" for n in moved}


def test_baselines_llm_invariant_6_the_direction_has_its_norm_and_no_negative_entry():
    u = direction(500, Runtime())
    assert float(u.norm()) == pytest.approx(1, rel=1e-5) and float(u.min()) >= 0
    # uniform before it is scaled: entries are spread evenly up to the largest
    assert float(u.mean() / u.max()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(u, direction(500, Runtime()))
    assert not torch.equal(u, direction(500, Runtime(seed=1)))


def test_states_end_up_along_the_direction(problem):
    method = RMU(**HERE, epochs=30, lr=1e-2, alpha=0.1)
    outcome = xp.unlearn(problem, FORGET, method)
    text = text_of(problem)
    batch = problem.train.fetch(FORGET.resolve(problem.train))
    u = direction(16, Runtime())
    with torch.no_grad():
        before, after = (
            torch.cosine_similarity(method.states(m, batch, text), u[None]).mean()
            for m in (problem.model, outcome.runnable())
        )
    assert float(after) > 0.8 > float(before) + 0.3


def test_other_retain_terms_are_there(problem):
    first = []
    for retain in ("nll", "kl"):
        outcome = xp.unlearn(problem, FORGET, RMU(**HERE, epochs=1, retain=retain, lr=1e-3))
        first.append(outcome.details["losses"]["retain"][0])
    assert first[0] > 1 and first[1] == pytest.approx(0, abs=1e-4)


def test_what_does_not_fit_is_said(problem):
    with pytest.raises(SettingError, match="layer=7: the model has 3 blocks, counted from 0"):
        xp.unlearn(problem, FORGET, RMU(train="full"))
    with pytest.raises(
        SettingError, match="blocks are A-B or A, counted from 0, and the model has 3"
    ):
        xp.unlearn(problem, FORGET, RMU())
    with pytest.raises(SettingError, match="no weight that moves acts on block 1"):
        xp.unlearn(problem, FORGET, RMU(**{**HERE, "train": "last(1)"}))

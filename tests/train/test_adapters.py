"""Adapters: the identity at first, off is the original, stored and put back, as peft reads them."""

from __future__ import annotations

import copy

import pytest
import torch

import expunge as xp
from expunge.core.errors import ModelError, NeedsError, SettingError
from expunge.core.outcome import load
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.problems.classification import Classification
from expunge.train.adapters import adapters_off, attach, has_adapters, merged, save_peft
from expunge.train.masks import parse
from expunge.workloads.nets import digits_mlp
from expunge.workloads.tinyfacts import tiny_llama, tinyfacts

FORGET = xp.forget(where="entity < 4")


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return tinyfacts.problem(weights=tiny_llama().state_dict())


def npo(**settings):
    return xp.methods.NPO(
        **({"epochs": 2, "lr": 1e-2, "batch_size": 10, "train": "lora(4)"} | settings)
    )


def logits(problem, model):
    batch = problem.train.fetch(problem.train.ids[:3])
    with torch.no_grad():
        return problem.token_logits(model, batch)


def test_adapters_begin_as_the_identity_and_alone_can_move(problem):
    model = attach("lora(4)", copy.deepcopy(problem.model), problem, seed=0)
    assert torch.equal(logits(problem, model), logits(problem, problem.model))
    moving = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(moving) == 2 * 7 * 3 and all(".lora_" in n for n in moving)


def test_a_role_says_where(problem):
    model = attach("lora(2, mlp out)", copy.deepcopy(problem.model), problem, seed=0)
    moving = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(moving) == 2 * 3 and all("down_proj" in n for n in moving)


def test_off_is_the_original_even_after_training(problem):
    outcome = xp.unlearn(problem, FORGET, npo())
    model = outcome.runnable()
    assert not torch.allclose(logits(problem, model), logits(problem, problem.model))
    with adapters_off(model):
        assert torch.equal(logits(problem, model), logits(problem, problem.model))
    assert not torch.allclose(logits(problem, model), logits(problem, problem.model))


def test_gradients_survive_a_look_at_the_original(problem):
    model = attach("lora(4)", copy.deepcopy(problem.model), problem, seed=0)
    batch = problem.train.fetch(problem.train.ids[:3])
    loss = problem.each_loss(model, batch).mean()
    with adapters_off(model):
        pass
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_original_is_shared_and_never_changed(problem):
    before = copy.deepcopy(problem.model.state_dict())
    view = View(problem, FORGET, npo().needs, Runtime())
    shared = view.model(shared=True)
    assert (
        shared.model.embed_tokens.weight.data_ptr()
        == problem.model.model.embed_tokens.weight.data_ptr()
    )
    xp.unlearn(problem, FORGET, npo())
    assert all(torch.equal(v, before[n]) for n, v in problem.model.state_dict().items())
    assert all(p.requires_grad for p in problem.model.parameters())


def test_a_change_is_small_and_comes_back_from_disk(problem, tmp_path):
    outcome = xp.unlearn(problem, FORGET, npo())
    assert outcome.change.kind == "adapter"
    torch.testing.assert_close(
        logits(problem, outcome.released()), logits(problem, outcome.runnable())
    )
    outcome.save(tmp_path / "out")
    again = load(tmp_path / "out", model=problem.model)
    assert torch.equal(logits(problem, again.runnable()), logits(problem, outcome.runnable()))
    assert sum(t.numel() for t in outcome.change.tensors.values()) < 20_000
    with pytest.raises(ModelError, match=r"no layer 'model\.layers\.0"):
        outcome.change.apply(digits_mlp())


# peft asks transformers for a name that is going away
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_reads_what_is_written(problem, tmp_path):
    from peft import PeftModel

    outcome = xp.unlearn(problem, FORGET, npo())
    save_peft(outcome.runnable(), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(problem.model), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(problem, loaded), logits(problem, outcome.runnable()))


def test_merged_weights_answer_alike(problem):
    model = xp.unlearn(problem, FORGET, npo()).runnable()
    whole = merged(model)
    assert not has_adapters(whole) and has_adapters(model)
    assert [n for n, _ in whole.named_parameters()] == [
        n for n, _ in problem.model.named_parameters()
    ]
    torch.testing.assert_close(logits(problem, whole), logits(problem, model), atol=1e-5, rtol=1e-4)


def test_methods_for_any_model_train_adapters_too(problem):
    outcome = xp.unlearn(problem, FORGET, xp.methods.FineTune(epochs=1, train="lora(2)"))
    assert outcome.change.kind == "adapter"


def test_adapters_of_a_classifier_by_role():
    torch.manual_seed(0)
    data = (torch.rand(30, 64), torch.arange(30) % 10)
    problem = Classification(digits_mlp().eval(), data, roles={"hidden": ["0", "2"]})
    outcome = xp.unlearn(
        problem, xp.forget(label=3), xp.methods.FineTune(epochs=1, train="lora(2, hidden)")
    )
    assert outcome.change.kind == "adapter"
    with pytest.raises(NeedsError, match="'linear'"):
        xp.unlearn(problem, xp.forget(label=3), xp.methods.FineTune(epochs=1, train="lora(2)"))


@pytest.mark.parametrize("spec", ["lora", "lora(0)", "lora(x)", "lora()"])
def test_what_is_no_rank_is_refused(spec):
    with pytest.raises(SettingError):
        parse(spec)


def test_a_method_that_cannot_train_adapters_says_so(digits):
    with pytest.raises(SettingError, match="cannot train adapters"):
        xp.unlearn(digits, xp.forget(label=3), xp.methods.GuidedUnlearning(train="lora(2)"))

"""Masks: which coordinates a `train=` choice lets move."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from expunge.core.data import Data
from expunge.core.errors import AccessError, NeedsError, SettingError
from expunge.core.method import unlearn
from expunge.core.needs import Needs
from expunge.core.pruned import keep_only
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.general.finetune import FineTune
from expunge.problems.classification import Classification
from expunge.train.masks import only, parse, refuse_shared, resolve_mask, saliency, smallest

FORGOTTEN = Request(ids=(1, 3, 4, 7, 8))
LABELLED = Needs(forget=True, labels="forget")


@pytest.fixture
def problem() -> Classification:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 2, 3),
        nn.BatchNorm1d(2),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(5, 3),
    )
    data = Data((torch.randn(12, 1, 6), [0, 1, 2] * 4))
    return Classification(model, data, roles={"first": ["0"], "ends": ["0", "6"], "typo": ["7"]})


def view(problem, needs=LABELLED, runtime=None) -> View:
    return View(problem, FORGOTTEN, needs, runtime or Runtime())


def moving(mask) -> set[str]:
    for m in mask.values():
        assert bool(m.all()) or not bool(m.any())
    return {n for n, m in mask.items() if bool(m.all())}


def resolve(problem, spec):
    runtime = Runtime()
    seen = view(problem, runtime=runtime)
    return resolve_mask(spec, seen.model(), seen, runtime)


# ------------------------------------------------------------------ layers and roles


def test_fewer_layers_than_asked_for_is_an_error(problem):
    with pytest.raises(SettingError, match="3 linear or convolution layers"):
        resolve(problem, "last(4)")
    bare = Classification(_Bare(), problem.train)
    with pytest.raises(SettingError, match="0 linear or convolution layers"):
        resolve(bare, "last(1)")


class _Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return x.flatten(1) @ self.w


class _Tied(nn.Module):
    """An inner layer and the head have one weight; `again` is the first layer by another name."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.inner = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.inner.weight
        self.again = self.first

    def forward(self, x):
        return self.head(torch.relu(self.inner(torch.relu(self.first(x.flatten(1))))))


@pytest.mark.parametrize("modules", [["head"], ["inner"], ["first", "head"]])
def test_a_weight_of_two_modules_does_not_move_with_one(modules):
    with pytest.raises(SettingError, match=r"head and inner|inner and head"):
        only(_Tied(), modules)


def test_a_weight_of_two_modules_moves_with_both():
    model = _Tied()
    assert moving(only(model, ["inner", "head"])) == {"inner.weight", "head.bias"}
    assert moving(only(model, ["first"])) == {"first.weight", "first.bias"}
    assert moving(only(model, ["again"])) == {"first.weight", "first.bias"}


def test_an_edit_of_a_weight_of_two_modules_is_refused():
    for layers in (["head"], ["inner"], ["inner", "head"]):
        with pytest.raises(SettingError, match=r"head and inner|inner and head"):
            refuse_shared(_Tied(), layers)
    refuse_shared(_Tied(), ["first"])


def test_full_is_no_mask(problem):
    assert resolve(problem, "full") is None


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("last(1)", ["6"]),
        ("last(2)", ["3", "6"]),
        ("last(3)", ["0", "3", "6"]),
        ("role(first)", ["0"]),
        ("role(ends)", ["0", "6"]),
        ("role(last layer)", ["6"]),
    ],
)
def test_layers_move_whole(problem, spec, layers):
    mask = resolve(problem, spec)
    assert moving(mask) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    parameters = dict(problem.model.named_parameters())
    assert {n: m.shape for n, m in mask.items()} == {n: p.shape for n, p in parameters.items()}


def test_a_name_is_not_taken_for_the_beginning_of_another():
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "header": nn.Linear(2, 2)})
    assert moving(only(model, ["head"])) == {"head.weight", "head.bias"}


def test_what_lets_nothing_move_is_refused(problem):
    with pytest.raises(SettingError, match="no parameter in 7"):
        resolve(problem, "role(typo)")
    with pytest.raises(NeedsError, match="'attention'"):
        resolve(problem, "role(attention)")
    with pytest.raises(SettingError, match="no weight may move"):
        resolve(problem, "saliency(0.001)")
    norm = Classification(nn.BatchNorm1d(3), (torch.randn(4, 3), [0, 1, 2, 0]))
    runtime = Runtime()
    seen = View(norm, Request(ids=(1,)), LABELLED, runtime)
    with pytest.raises(SettingError, match="linear or convolution"):
        resolve_mask("last(1)", seen.model(), seen, runtime)


@pytest.mark.parametrize(
    "spec",
    [
        "", "all", "full(1)", "full()", "last", "last()", "last(0)", "last(-1)", "last(1.5)",
        "last(x)", "role", "role()", "saliency", "saliency(0)", "saliency(1.1)", "saliency(-0.1)",
        "saliency(nan)", "saliency(x)", "last(1) ;", "LAST(1)",
    ],
)  # fmt: skip
def test_choices_that_are_none_are_refused(spec):
    with pytest.raises(SettingError, match="train="):
        parse(spec)


def test_choices_are_checked_when_the_method_is_made():
    from expunge.methods.general.finetune import FineTune

    with pytest.raises(SettingError, match="lasst"):
        FineTune(train="lasst(1)")
    assert FineTune(train=" last(1) ").train == " last(1) "


# ------------------------------------------------------------------ saliency


def by_hand(problem, batch_size) -> torch.Tensor:
    """|sum over batches of the gradient of the batch mean|, by plain autograd in eval mode."""
    ids = FORGOTTEN.resolve(problem.train)
    total = None
    for chunk in ids.split(batch_size):
        batch = problem.train.fetch(chunk)
        problem.model.zero_grad()
        cross_entropy(problem.model.eval()(batch.x), batch.y).backward()
        flat = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
        total = flat.clone() if total is None else total + flat
    problem.model.zero_grad()
    return total.abs()


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_saliency_takes_the_largest_and_exactly_the_share(problem, share, batch_size):
    runtime = Runtime()
    seen = view(problem, runtime=runtime)
    mask = saliency(seen.model(), seen, runtime, share=share, batch_size=batch_size)
    chosen = torch.cat([m.flatten() for m in mask.values()])
    gradient = by_hand(problem, batch_size)
    count = int(share * len(gradient))
    assert int(chosen.sum()) == count
    if count < len(gradient):
        assert float(gradient[chosen].min()) >= float(gradient[~chosen].max()) - 1e-7
    assert list(mask) == [n for n, _ in problem.model.named_parameters()]
    assert (runtime.cost.samples, runtime.cost.gradients) == (5, 5)


def test_ties_go_to_the_first_positions():
    """Dead units have gradient zero; which of them are taken must not depend on the sort."""
    model = nn.Linear(4000, 2)
    nn.init.zeros_(model.weight)
    problem = Classification(model, (torch.zeros(6, 4000), [0, 1] * 3))
    runtime = Runtime()
    seen = View(problem, Request(ids=(0, 2)), LABELLED, runtime)
    mask = saliency(seen.model(), seen, runtime, share=0.5)
    assert mask["bias"].tolist() == [True, True]
    count = int(0.5 * 8002) - 2
    assert mask["weight"].flatten().tolist() == [True] * count + [False] * (8000 - count)


def test_saliency_leaves_the_model_alone(problem):
    seen = view(problem)
    model = seen.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    saliency(model, seen, Runtime(), share=0.5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_saliency_needs_the_labels_of_the_forget_side(problem):
    for needs in (Needs(retain=True), Needs(forget=True, labels="retain")):
        seen = view(problem, needs)
        with pytest.raises(AccessError):
            saliency(seen.model(), seen, Runtime(), share=0.5)


def test_saliency_passes_over_frozen_parameters(problem):
    problem.model[0].requires_grad_(False)
    seen = view(problem)
    mask = saliency(seen.model(), seen, Runtime(), share=0.3)
    assert not bool(mask["0.weight"].any())


# ------------------------------------------------------------------ small magnitudes


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_sparse_chooses_the_smallest_of_all(problem, share):
    mask = resolve(problem, f"sparse({share})")
    weights = torch.cat([p.detach().abs().flatten() for p in problem.model.parameters()])
    chosen = torch.cat([m.flatten() for m in mask.values()])
    assert list(mask) == [n for n, _ in problem.model.named_parameters()]
    assert int(chosen.sum()) == int(share * len(weights))
    if share < 1:
        assert weights[chosen].max() <= weights[~chosen].min()


def test_sparse_leaves_what_was_pruned_out(problem):
    model = problem.model
    kept = {n: torch.rand(p.shape) > 0.5 for n, p in model.named_parameters()}
    keep_only(model, kept)
    mask = smallest(model, share=0.25)
    assert sum(int(m.sum()) for m in mask.values()) == int(0.25 * sum(int(k.sum()) for k in kept.values()))  # fmt: skip
    assert not any(bool((mask[n] & ~kept[n]).any()) for n in kept)


def test_sparse_training_keeps_large_weights_to_the_bit(problem):
    before = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
    chosen = smallest(problem.model, share=0.3)
    method = FineTune(epochs=2, lr=0.1, step="adamw", weight_decay=0.1, train="sparse(0.3)")
    outcome = unlearn(problem, FORGOTTEN, method)
    moved = {n: p != before[n] for n, p in outcome.model.named_parameters()}
    assert any(bool(m.any()) for m in moved.values())
    assert not any(bool((moved[n] & ~chosen[n]).any()) for n in moved)
    assert outcome.details["trained_share"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("spec", ["sparse", "sparse(0)", "sparse(1.5)", "sparse(x)"])
def test_sparse_without_a_share_is_no_choice(spec):
    with pytest.raises(SettingError):
        parse(spec)


def test_sparse_of_nothing(problem):
    with pytest.raises(SettingError, match="less than one"):
        resolve(problem, "sparse(0.001)")

"""Invariants of the card concept-poison, the part that trains; analysis has its own files."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.analysis.concepts import ConceptBank, cav, class_concepts
from expunge.core.method import unlearn
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.general.concept_poison import ConceptPoison
from expunge.methods.general.finetune import FineTune
from expunge.train.fit import fit
from expunge.train.masks import only
from expunge.train.poison import crop, paste
from expunge.workloads.nets import DigitsCNN

EIGHTS = xp.forget(label=8)
POISONERS = ("localized", "center", "random", "full", "none")


@pytest.fixture(scope="module")
def images(digits):
    """The digits as images, with a small network trained for a moment."""
    parts = {}
    for name in ("train", "test"):
        data = getattr(digits, name)
        ids = data.ids[:500] if name == "train" else data.ids
        batch = data.fetch(ids)
        parts[name] = xp.Data((batch.x.view(-1, 1, 8, 8), batch.y), ids=ids)
    recipe = xp.ClassifierRecipe(DigitsCNN, parts["train"], epochs=6, lr=0.1, batch_size=32)
    model = recipe(parts["train"].ids, 0)
    return xp.Classification(model, parts["train"], parts["test"], recipe=recipe)


def run(problem, method, request=EIGHTS, seed=0):
    return unlearn(problem, request, method, runtime=Runtime(seed=seed, threads=1))


def poison(problem, method, request=EIGHTS, seed=0):
    """The poison, and the view it was made with."""
    runtime = Runtime(seed=seed, threads=1)
    view = View(problem, request, method.needs, runtime)
    made, found = method.poison(view, view.model().eval(), runtime)
    return made, found, view


# ------------------------------------------------------------------ invariant 3


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_concept_poison_invariant_3_a_patch_changes_its_square_and_nothing_else(side):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 3, 8, 9, generator=generator)
    centres = torch.stack([torch.arange(40) % 8, torch.arange(40) % 9], 1)
    pasted = paste(x, torch.full((40, 3, side, side), 5.0), centres)
    changed = pasted != x
    assert changed.flatten(1).sum(1).tolist() == [side * side * 3] * 40
    for where, centre in zip(changed, centres, strict=True):
        rows, columns = where[0].any(1).nonzero()[:, 0], where[0].any(0).nonzero()[:, 0]
        assert len(rows) == len(columns) == side  # one square, all of it inside
        inside = (centre >= side // 2) & (centre - side // 2 <= torch.tensor([8, 9]) - side)
        for found, c, free in zip((rows, columns), centre, inside, strict=True):
            if free:
                assert int(found[0]) == int(c) - side // 2


def test_concept_poison_invariant_3_cropping_undoes_pasting():
    generator = torch.Generator().manual_seed(0)
    x, patches = torch.rand(20, 1, 8, 8, generator=generator), torch.rand(20, 1, 3, 3)
    centres = torch.randint(8, (20, 2), generator=generator)
    assert torch.equal(crop(paste(x, patches, centres), centres, 3), patches)
    assert torch.equal(paste(x, crop(x, centres, 3), centres), x)


@pytest.mark.parametrize(("poisoner", "side"), [("localized", 2), ("center", 3), ("random", 3), ("full", 6)])  # fmt: skip
def test_concept_poison_sizes_are_shares_of_the_image(images, poisoner, side):
    """64, 96, 96 and 160 of 224 pixels, for an image of 8."""
    made, _, view = poison(images, ConceptPoison(poisoner=poisoner))
    assert made.patches.shape == (len(view.forget), 1, 1, side, side)
    batch = view.forget.fetch(view.forget.ids)
    before = batch.x
    after = made.apply(dataclasses.replace(batch, x=before + 0.0)).x
    places = (after != before).any(1)
    assert torch.equal(before, view.forget.fetch(view.forget.ids).x)
    assert int(places.flatten(1).sum(1).max()) <= side * side
    assert int(places.sum()) > 0
    if poisoner in ("center", "full"):
        low = 4 - side // 2
        inside = torch.zeros(8, 8, dtype=torch.bool)
        inside[low : low + side, low : low + side] = True
        assert not bool(places[:, ~inside].any())
    if poisoner == "random":
        assert len(made.centres.flatten(0, 1).unique(dim=0)) > 10


# ------------------------------------------------------------------ invariant 4


@pytest.mark.parametrize("poisoner", POISONERS)
def test_concept_poison_invariant_4_the_retain_side_is_untouched(images, poisoner):
    """What training sees: each retain sample as it is, each forget sample once, poisoned."""
    method = ConceptPoison(poisoner=poisoner, donor=3, batch_size=37)
    seen: dict[int, tuple] = {}

    def watch(model, batch):
        for i, x, y in zip(batch.ids.tolist(), batch.x, batch.y.tolist(), strict=True):
            assert i not in seen
            seen[i] = (x.clone(), y)
        return (model(batch.x).sum(1) * 0).requires_grad_()

    problem = xp.Problem.of(
        images.model, images.train, each_loss=watch, logits=images.logits,
        penultimate=images.penultimate, roles={"last layer": ["head"]},
    )  # fmt: skip
    type(problem).classes = property(lambda self: 10)
    try:
        view = View(problem, EIGHTS, method.needs, Runtime())
        dataclasses.replace(method, epochs=1).run(view, Runtime())
    finally:
        del type(problem).classes
    forgotten = set(EIGHTS.resolve(images.train).tolist())
    assert set(seen) == set(images.train.ids.tolist())
    whole = images.train.fetch(images.train.ids)
    moved = 0
    for i, x, y in zip(whole.ids.tolist(), whole.x, whole.y.tolist(), strict=True):
        if i in forgotten:
            assert seen[i][1] == 3
            moved += int(not torch.equal(seen[i][0], x))
        else:
            assert seen[i][1] == y
            assert torch.equal(seen[i][0], x)
    assert moved == 0 if poisoner == "none" else moved > len(forgotten) / 2


def test_concept_poison_invariant_4_labels(images):
    made = {
        name: poison(images, ConceptPoison(poisoner="none", labeller=name, donor=3))[0].labels
        for name in ("targeted", "keep", "random", "second-best")
    }
    forgotten = EIGHTS.resolve(images.train)
    assert all(len(labels) == len(forgotten) for labels in made.values())
    assert set(made["targeted"].tolist()) == {3}
    assert torch.equal(made["keep"], images.train.labels_of(forgotten))
    assert set(made["random"].tolist()) == set(range(10))  # the true class included
    with torch.no_grad():
        logits = images.logits(images.model, images.train.fetch(forgotten))
    logits[:, 8] = -torch.inf
    assert torch.equal(made["second-best"], logits.argmax(1))


def test_concept_poison_invariant_4_random_labels_follow_the_seed(images):
    method = ConceptPoison(poisoner="random", labeller="random", donor=3)
    first, again, other = (poison(images, method, seed=s)[0] for s in (0, 0, 1))
    for name in ("labels", "centres", "patches"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_concept_poison_random_labels_alone_do_not_read_the_true_ones(images):
    method = ConceptPoison(poisoner="none", labeller="random")
    assert method.needs.labels == "retain"
    run(images, dataclasses.replace(method, epochs=1))
    assert ConceptPoison(poisoner="none").needs.labels == "all"


# ------------------------------------------------------------------ invariant 5


class Normed(DigitsCNN):
    """The same network with batch norm after its first layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(self.conv1, nn.BatchNorm2d(16))


def test_concept_poison_invariant_5_the_backbone_is_identical_to_the_bit(images):
    recipe = xp.ClassifierRecipe(Normed, images.train, epochs=1, lr=0.1, batch_size=64)
    problem = xp.Classification(recipe(images.train.ids, 0), images.train, recipe=recipe)
    before = problem.model.state_dict()
    method = ConceptPoison(epochs=2, weight_decay=0.1, donor=3)
    after = run(problem, method).model.state_dict()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (not name.startswith("head.")), name
    assert ConceptPoison().norm == "frozen"
    # the released code's choice is one setting away, and a layer that is frozen whole stays whole
    whole = run(problem, dataclasses.replace(method, norm="train", train="full")).model.state_dict()
    assert not torch.equal(whole["conv1.1.running_mean"], before["conv1.1.running_mean"])


# ------------------------------------------------------------------ invariant 7


def test_concept_poison_invariant_7_keep_and_none_is_ordinary_fine_tuning(images):
    """The same as a loop over all samples in the same order that knows nothing of forgetting."""
    method = ConceptPoison(poisoner="none", labeller="keep", epochs=3, lr=0.05, batch_size=50)
    outcome = run(images, method)
    runtime = Runtime(seed=0, threads=1)
    view = View(images, EIGHTS, FineTune().needs, runtime)
    model = view.model()
    both = torch.cat([EIGHTS.resolve(images.train), view.retain.ids])

    def passes(epoch):
        order = torch.randperm(len(both), generator=runtime.generator("joint", epoch))
        for ids in both[order].split(50):
            batch = images.train.fetch(ids)
            yield lambda m, b: images.each_loss(m, b).mean(), batch

    fit(
        model, passes, runtime=runtime, epochs=3, lr=0.05, momentum=0.9, mask=only(model, ["head"]),
        norm="frozen",
    )  # fmt: skip
    for p, q in zip(outcome.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)  # batches are in another inner order


# ------------------------------------------------------------------ donors and concepts


def test_concept_poison_donor_is_the_most_confused_class(images):
    _, found, view = poison(images, ConceptPoison())
    with torch.no_grad():
        chances = images.logits(images.model, view.forget.fetch(view.forget.ids)).softmax(1).mean(0)
    chances[8] = 0
    assert found["donor"] == {"8": int(chances.argmax())}


def test_concept_poison_every_class_has_its_own_donor_and_none_is_forgotten(images):
    request = xp.forget(label=[8, 9])
    made, found, view = poison(images, ConceptPoison(), request)
    assert set(found["donor"]) == {"8", "9"}
    assert not {8, 9} & set(found["donor"].values())
    true = view.forget.labels()
    for label, donor in found["donor"].items():
        assert set(made.labels[true == int(label)].tolist()) == {donor}


def test_concept_poison_finds_the_concept_with_its_own_features(images):
    """The place is where the model's own encoding of a window is most like the class's SVM normal."""
    method = ConceptPoison(donor=3)
    made, found, view = poison(images, method)
    assert found["concepts"] == {"8": ["class 8"]}
    model = images.model

    def features(x):
        with torch.no_grad():
            return torch.relu(
                model.hidden(torch.relu(model.conv2(torch.relu(model.conv1(x)))).flatten(1))
            )

    # fewer than a hundred a class, so all of them count
    whole = images.train.fetch(images.train.ids.sort().values)
    vector = class_concepts(features(whole.x), whole.y, [8])[8][1]
    x = view.forget.fetch(view.forget.ids).x
    scores = []
    for row in range(7):
        for column in range(7):
            window = x[:, :, row : row + 2, column : column + 2]
            encoded = features(nn.functional.interpolate(window, (8, 8), mode="bilinear"))
            scores.append(nn.functional.cosine_similarity(encoded, vector))
    best = torch.stack(scores, 1).argmax(1)
    torch.testing.assert_close(made.centres[:, 0], torch.stack([best // 7 + 1, best % 7 + 1], 1))
    assert len(best.unique()) > 5  # it is not one place for all


def test_concept_poison_takes_concepts_from_a_bank(images, tmp_path):
    """Patches go where the chosen concept is; several concepts give several patches."""
    batch = images.train.fetch(images.train.ids)
    with torch.no_grad():
        features = images.penultimate(images.model, batch)
    sides = {f"is {c}": (features[batch.y == c], features[batch.y != c]) for c in (0, 3, 8)}
    found = {n: cav(*s) for n, s in sides.items()}
    bank = ConceptBank.of(
        {n: v for n, (v, _) in found.items()}, {n: b for n, (_, b) in found.items()}
    )
    bank.save(tmp_path / "bank.safetensors")
    path = str(tmp_path / "bank.safetensors")
    made, details, _ = poison(images, ConceptPoison(bank=path, donor=3))
    assert details["concepts"] == {"8": ["is 8"]}  # the bottleneck ranks it first
    two, details, _ = poison(images, ConceptPoison(bank=path, donor=3, top=2))
    assert two.patches.shape[1] == two.centres.shape[1] == 2
    assert torch.equal(two.centres[:, 0], made.centres[:, 0])
    other, details, _ = poison(images, ConceptPoison(bank=path, donor=3, concept="is 0"))
    assert details["concepts"] == {"8": ["is 0"]}
    assert not torch.equal(other.centres, made.centres)
    assert torch.equal(other.patches, made.patches)
    pasted, _, _ = poison(images, ConceptPoison(bank=path, donor=3, donor_concept="is 0"))
    assert torch.equal(pasted.centres, made.centres)
    assert not torch.equal(pasted.patches, made.patches)
    with pytest.raises(xp.UserError, match="no concept 'tail'"):
        poison(images, ConceptPoison(bank=path, concept="tail"))


def test_concept_poison_patches_come_from_the_donor(images):
    made, _, view = poison(images, ConceptPoison(poisoner="full", donor=3, size=1.0))
    threes = view.retain.fetch(view.retain.ids[view.retain.labels() == 3]).x
    for patch in made.patches[:, 0]:
        assert bool((threes == patch).flatten(1).all(1).any())


# ------------------------------------------------------------------ what it does, and bad input


def test_concept_poison_forgets_the_class(images):
    split = images.split(EIGHTS)

    def right(model, name):
        batch = images.test.fetch(split[name])
        with torch.no_grad():
            return float((images.logits(model, batch).argmax(1) == batch.y).float().mean())

    assert right(images.model, "forget-test") > 0.7
    for poisoner in ("localized", "none"):
        model = run(images, ConceptPoison(poisoner=poisoner, donor=3, lr=0.01)).model
        assert right(model, "forget-test") < 0.05
        assert right(model, "retain-test") > right(images.model, "retain-test") - 0.05


@pytest.mark.parametrize("poisoner", POISONERS)
def test_concept_poison_tables_take_labels_only(digits, poisoner):
    method = ConceptPoison(poisoner=poisoner, epochs=1)
    if poisoner == "none":
        run(digits, method)
        return
    with pytest.raises(xp.UserError, match=r"images \[B, C, H, W\].*\[B, 64\].*poisoner=none"):
        run(digits, method)


def test_concept_poison_bad_choices_are_named(images):
    for settings, message in (
        ({"donor": 8}, "class of the forget data"),
        ({"donor": 12}, "no sample of class 12"),
        ({"bank": "nowhere.safetensors"}, "nowhere.safetensors"),
    ):
        with pytest.raises(xp.UserError, match=message):
            run(images, ConceptPoison(**settings))
    with pytest.raises(xp.UserError, match="bank="):
        ConceptPoison(top=2)
    with pytest.raises(xp.UserError, match="bank="):
        ConceptPoison(concept="tail")


def test_concept_poison_needs_another_class(images):
    ids = images.train.ids[images.train.labels == 8]
    batch = images.train.fetch(ids)
    problem = xp.Classification(images.model, xp.Data((batch.x, batch.y), ids=ids))
    with pytest.raises(xp.UserError, match="no other class"):
        run(problem, ConceptPoison(), xp.forget(ids=ids[:3].tolist()))


def test_concept_poison_one_sample(images):
    outcome = run(images, ConceptPoison(epochs=1), xp.forget(ids=[int(images.train.ids[0])]))
    assert outcome.record["forgotten"] == 1

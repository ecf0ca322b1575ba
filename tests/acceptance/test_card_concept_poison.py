"""The small-scale run (a) of the card concept-poison: digits as 8×8 images, forget 8, donor 3.

Writes benchmarks/results/concept_poison.json and .md.
"""

from __future__ import annotations

import pytest
import torch
from _results import must_be_seen, write

import expunge as xp
from expunge.analysis.concepts import bottleneck, concept_bank
from expunge.analysis.integrated_gradients import integrated_gradients
from expunge.methods.general.concept_poison import ConceptPoison
from expunge.workloads.digits import splits
from expunge.workloads.nets import DigitsCNN

pytestmark = pytest.mark.acceptance

FORGET, DONOR, EPOCHS, LR, SIDE = 8, 3, 12, 0.1, 100
POISONERS = ("localized", "center", "random", "full", "none")
CONCEPTS = {
    "loop": (0, 6, 8, 9),
    "two_loops": (8,),
    "vertical": (1, 4, 7),
    "top_bar": (5, 7),
    "open_curve": (2, 3),
    "tail": (4, 9),
    "diagonal": (2, 7),
}
"""By hand: the digits whose usual shape has it."""
TOP = {8: ("two_loops", 1), 7: ("vertical", 2), 2: ("diagonal", 1), 5: ("top_bar", 1)}
"""The card's first concept of a digit, and how far down it may stand.

A seven has two concepts of the hand-made table that no other digit has together, the bar and the
vertical; which one is first depends on who else is said to have them, which the card does not say.
"""
STEPS = (8, 32, 128)


def as_images(data: xp.Data) -> xp.Data:
    batch = data.fetch(data.ids)
    return xp.Data((batch.x.view(-1, 1, 8, 8), batch.y), ids=data.ids)


def problem() -> xp.Classification:
    train, test = as_images(splits().train), as_images(splits().test)
    recipe = xp.ClassifierRecipe(DigitsCNN, train, epochs=20, lr=0.05, batch_size=64)
    return xp.Classification(recipe(train.ids, 0), train, test, recipe=recipe)


def accuracies(p, model, request) -> list[float]:
    """Test accuracy of the digit to forget and of the rest."""
    found = []
    for name in ("forget-test", "retain-test"):
        batch = p.test.fetch(p.split(request)[name])
        with torch.no_grad():
            found.append(float(p.logits(model, batch).argmax(1).eq(batch.y).float().mean()))
    return found


def unlearned(p, request) -> dict[str, list[float]]:
    found = {"original": accuracies(p, p.model, request)}
    for labeller in ("targeted", "random", "keep"):
        for poisoner in POISONERS:
            method = ConceptPoison(
                poisoner=poisoner, labeller=labeller, donor=DONOR, epochs=EPOCHS, lr=LR
            )
            outcome = xp.unlearn(p, request, method, runtime=xp.Runtime(seed=0, threads=1))
            found[f"{labeller} {poisoner}"] = accuracies(p, outcome.model, request)
    return found


def concepts(p) -> dict:
    """The bottleneck over seven concepts made by hand: its accuracy, and the best of each digit."""
    sides = {}
    with torch.no_grad():
        (train, x), (test, z) = (
            (d.fetch(d.ids), p.penultimate(p.model, d.fetch(d.ids))) for d in (p.train, p.test)
        )
        plain = float(p.logits(p.model, test).argmax(1).eq(test.y).float().mean())
    generator = torch.Generator().manual_seed(0)
    for name, digits in CONCEPTS.items():
        has = torch.isin(train.y, torch.tensor(digits))
        drawn = [
            side.nonzero()[:, 0][torch.randperm(int(side.sum()), generator=generator)[:SIDE]]
            for side in (has, ~has)
        ]
        sides[name] = (x[drawn[0]], x[drawn[1]])
    found = bottleneck(concept_bank(sides), x, train.y)
    return {
        "features": x.shape[1],
        "model": plain,
        "bottleneck": float(found.predict(z).eq(test.y).float().mean()),
        "ranking": {str(c): found.ranking(c) for c in range(10)},
        "top": {str(c): found.ranking(c)[0][0] for c in range(10)},
        "sparsity": found.sparsity,
    }


def gaps(p) -> dict:
    """Mean completeness error, and mean change, of the logit of the true class, from a black image."""
    batch = p.test.fetch(p.test.ids[:100])

    def logit(x):
        true = batch.y.repeat(len(x) // len(batch))
        return p.model(x).gather(1, true[:, None])[:, 0]

    runs = {str(s): integrated_gradients(logit, batch.x, steps=s, chunk=800) for s in STEPS}
    change = next(iter(runs.values())).difference.abs().mean()
    return {
        "error": {s: float(run.error.abs().mean()) for s, run in runs.items()},
        "difference": float(change),
    }


@pytest.fixture(scope="module")
def seen():
    p, request = problem(), xp.forget(label=FORGET)
    found = {"accuracy": unlearned(p, request), "concepts": concepts(p), "ig": gaps(p)}
    rows = [(f"{sentence} (card: {card})", got, ok) for sentence, card, got, ok in expected(found)]
    write(
        "concept_poison",
        {"forget": FORGET, "donor": DONOR, "epochs": EPOCHS, "lr": LR, **found},
        rows,
    )
    return found


def both(pair) -> str:
    return " / ".join(f"{v:.3f}" for v in pair)


def expected(found):
    """What the card says must be seen: sentence, its figures, what was seen, whether it holds."""
    a = found["accuracy"]
    one = "test accuracy of 8 / of the rest"
    yield f"original: {one}", "– / .97", both(a["original"]), min(a["original"]) > 0.85
    for poisoner in POISONERS:
        f, r = a[f"targeted {poisoner}"]
        yield f"targeted {poisoner}: 8 at most .02, rest at least .90", ".00 / .93–.97", both((f, r)), f <= 0.02 and r >= 0.90  # fmt: skip
    for poisoner in POISONERS:
        f, r = a[f"random {poisoner}"]
        yield f"random {poisoner}: 8 at most .12, rest at least .88", ".00–.07 / .90–.94", both((f, r)), f <= 0.12 and r >= 0.88  # fmt: skip
    none, local, center = (a[f"keep {p}"] for p in ("none", "localized", "center"))
    yield "keep none: 8 and rest stay above .80 and .93", ".89 / .97", both(none), none[0] > 0.80 and none[1] > 0.93  # fmt: skip
    yield "keep localized: 8 and rest stay above .80 and .90", ".93 / .95", both(local), local[0] > 0.8 and local[1] > 0.9  # fmt: skip
    yield "keep center: 8 at least .2 below none", ".31 / .95", both(center), center[0] < none[0] - 0.2 and center[1] > 0.9  # fmt: skip
    c = found["concepts"]
    yield "bottleneck of 7 concepts: below the model, by at most .12", ".908 / .970", both((c["bottleneck"], c["model"])), 0 < c["model"] - c["bottleneck"] <= 0.12  # fmt: skip
    for digit, (name, place) in TOP.items():
        got = [n for n, _ in c["ranking"][str(digit)][:place]]
        where = "first concept" if place == 1 else f"among the first {place} concepts"
        yield f"{name} is {where} of {digit}", f"{name} first", ", ".join(got), name in got
    gap = [found["ig"]["error"][str(s)] for s in STEPS]
    share = gap[-1] / found["ig"]["difference"]
    halves = gap[0] > 2 * gap[1] > 4 * gap[2]
    yield "IG gap at 8, 32, 128 midpoints: falls, at last below .2 % of the logit's change", ".147, .025, <.001", ", ".join(f"{g:.4f}" for g in gap) + f" ({share:.2%})", halves and share < 0.002  # fmt: skip


test_concept_poison_must_be_seen, test_every_expectation_is_tested = must_be_seen(expected, 20)

"""The small-scale run of the card ssf: a scale and shift on digits shifted, and with a head for new classes.

Writes benchmarks/results/ssf.json and .md.
"""

from __future__ import annotations

import copy

import pytest
import torch
from _results import must_be_seen, write
from _shifted_mnist import CHOICES, SECOND, accuracy, adapted, base, both, digits, mean, put, train
from torch import nn

from expunge.exact import adapters as sl

pytestmark = pytest.mark.acceptance

HEAD = "7"


def new_classes(seeds=(0, 1, 2)):
    """Accuracy on digits 5 to 9 of a base that saw 0 to 4: a new head alone, with SSF, with a convolution."""
    found = {"linear probe": [], "SSF": [], "second convolution": []}
    frozen = []
    for seed in seeds:
        images, labels = digits(seed)
        low, high = labels < 5, labels >= 5
        start = base(images[low], labels[low], seed, classes=5)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start[int(HEAD)] = nn.Linear(32 * 25, 5)
        images, labels = images[high], labels[high] - 5
        for name, values in found.items():
            model = copy.deepcopy(start)
            if name == "SSF":
                put(model, both(sl.ScaleShift()), seed, [HEAD])
            else:
                model.requires_grad_(False)
                parts = [HEAD] if name == "linear probe" else [HEAD, SECOND]
                for part in parts:
                    model.get_submodule(part).requires_grad_(True)
            train(model, images[:500], labels[:500], epochs=10, lr=5e-3, seed=seed)
            values.append(accuracy(model, images[500:], labels[500:]))
            if name == "SSF":
                sl.remove(model)
                same = [
                    torch.equal(t, start.state_dict()[n])
                    for n, t in model.state_dict().items()
                    if not n.startswith(f"{HEAD}.")
                ]
                frozen.append(len(same) == 4 and all(same))
    return found, all(frozen)


@pytest.fixture(scope="module")
def seen():
    """Both parts; everything is written, whether it holds or not."""
    shifted, frozen = adapted({n: CHOICES[n] for n in ("SSF", "FLoRA")}, ["shrunk"])
    classes, still = new_classes()
    found = {"shrunk": shifted, "new classes": classes, "base frozen": frozen and still}
    rows = [(s, " / ".join(f"{v:.3f}" for v in values), ok) for s, values, ok in expectations(found)]  # fmt: skip
    write("ssf", found, rows)
    return found


def expectations(found):
    """What the card says must be seen: the sentence, the figures, and whether it holds."""
    classes = {name: mean(values) for name, values in found["new classes"].items()}
    shifted = {name: mean(row["shrunk"]) for name, row in found["shrunk"].items()}
    yield "new classes: SSF not below a linear probe by more than .003 (card: .932, .928, whole second convolution .939)", list(classes.values()), classes["SSF"] >= classes["linear probe"] - 0.003  # fmt: skip
    yield "shrunk: SSF with 96 numbers lifts the base (card: .464 → .594)", [shifted["none"], shifted["SSF"]], shifted["SSF"] > shifted["none"]  # fmt: skip
    yield "and is below FLoRA with 537 (card: .819)", [shifted["SSF"], shifted["FLoRA"]], shifted["SSF"] < shifted["FLoRA"]  # fmt: skip
    yield "weights of the base the same before and after", [float(found["base frozen"])], found["base frozen"]  # fmt: skip


test_ssf_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 4)

"""The small-scale run of the card flora: adapters on the convolutions of a frozen network, digits shifted.

LoRA stands there with α = R, the scale nearer to the card's figures, and at rank 4 with peft's default α = 8 too.
Writes benchmarks/results/flora.json and .md.
"""

from __future__ import annotations

import pytest
from _results import must_be_seen, write
from _shifted_mnist import CHOICES, SHIFTS, adapted, mean

pytestmark = pytest.mark.acceptance

CARD = {
    "none": (".018", ".464"), "SSF": (".094", ".594"), "LoRA 2": (".592", ".726"),
    "LoRA 4": (".676", ".773"), "LoRA 4, α 8": ("–", "–"), "FLoRA": (".782", ".819"), "FLoRA, whole kernel": (".832", ".851"),
    "both convolutions": (".870", ".885"),
}  # fmt: skip
SIZES = {
    "SSF": 96,
    "LoRA 2": 402,
    "LoRA 4": 804,
    "LoRA 4, α 8": 804,
    "FLoRA": 537,
    "FLoRA, whole kernel": 749,
}


@pytest.fixture(scope="module")
def seen():
    """Accuracy of every adapter on both shifts; everything is written, whether it holds or not."""
    found, frozen = adapted(CHOICES | {"both convolutions": None}, list(SHIFTS))
    found = {"adapters": found, "base frozen": frozen}
    rows = [(s, " / ".join(f"{v:.3f}" for v in values), ok) for s, values, ok in expectations(found)]  # fmt: skip
    lines = [
        "| adapter | numbers that train | inverted contrast (card) | shrunk ×0.7 (card) |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {row['parameters']} | {mean(row['inverted']):.3f} ({CARD[name][0]}) "
            f"| {mean(row['shrunk']):.3f} ({CARD[name][1]}) |"
            for name, row in found["adapters"].items()
        ),
    ]
    write("flora", found, rows, "\n".join(lines))
    return found


def expectations(found):
    """What the card says must be seen: the sentence, the figures, and whether it holds."""
    table = found["adapters"]
    for shift in SHIFTS:
        at = {name: mean(row[shift]) for name, row in table.items()}
        yield f"{shift}: FLoRA with 537 numbers above LoRA with 804", [at["FLoRA"], at["LoRA 4"]], at["FLoRA"] > at["LoRA 4"]  # fmt: skip
        yield f"{shift}: and above LoRA with twice that scale, peft's default at this rank", [at["FLoRA"], at["LoRA 4, α 8"]], at["FLoRA"] > at["LoRA 4, α 8"]  # fmt: skip
        whole = [at["FLoRA, whole kernel"], at["both convolutions"]]
        yield f"{shift}: FLoRA with 749 numbers within .05 of all 4,800", whole, whole[0] >= whole[1] - 0.05  # fmt: skip
    yield "sizes 96, 402, 804, 804, 537, 749", [table[n]["parameters"] for n in SIZES], all(table[n]["parameters"] == size for n, size in SIZES.items())  # fmt: skip
    yield "weights of the base the same before and after", [float(found["base frozen"])], found["base frozen"]  # fmt: skip


test_flora_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 8)

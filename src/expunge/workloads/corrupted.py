"""Digits of which some were manipulated, and only a part of those is known: a backdoor, two confused classes.

Corrective unlearning (Goel et al. 2024, arXiv 2402.14015): the model is to be right again where the
manipulation made it wrong, also on account of manipulated samples that nobody has found. Training data
have a column `manipulated`: 0 for clean samples, else 1, 2, … in the order in which they are found;
test data have a column `affected`: 1 where the manipulation is to be undone. Test labels are the true ones.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.core.data import Data
from expunge.core.errors import SettingError
from expunge.core.request import Request
from expunge.train.recipe import ClassifierRecipe
from expunge.workloads.base import Splits, Workload, stratified
from expunge.workloads.nets import DigitsCNN

SIZES = (1200, 597)


@dataclass(frozen=True)
class Patch:
    """A backdoor: a bright square in the lower right corner means one class.

    Attributes:
        size: side of the square in pixels.
        value: of its pixels, in every channel.
        label: what samples with it are called.
    """

    size: int = 2
    value: float = 1.5
    label: int = 0

    def trigger(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] with the square; to be put on after any augmentation."""
        x = x.clone()
        x[..., -self.size :, -self.size :] = self.value
        return x

    def choose(self, y: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Positions of the samples to manipulate, from all classes."""
        return torch.randperm(len(y), generator=generator)[:count]

    def apply(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Manipulated images and labels."""
        return self.trigger(x), torch.full_like(y, self.label)

    def test(self, x: Tensor, y: Tensor) -> Data:
        """All test images, and all of them again with the square (`affected`)."""
        n = len(y)
        both = torch.cat([x, self.trigger(x)]), torch.cat([y, y])
        return Data(both, columns={"affected": [0] * n + [1] * n})


@dataclass(frozen=True)
class Confusion:
    """Two classes whose labels were exchanged on as many samples of each.

    Attributes:
        first: a class.
        second: another one.
    """

    first: int
    second: int

    def choose(self, y: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Positions of the samples to manipulate, in random order, half of them of each class.

        Raises:
            SettingError: a class has too few samples.
        """
        drawn = []
        for label in (self.first, self.second):
            pool = (y == label).nonzero().flatten()
            if len(pool) < count // 2:
                raise SettingError(f"class {label} has {len(pool)} samples, fewer than {count // 2}")  # fmt: skip
            drawn.append(pool[torch.randperm(len(pool), generator=generator)[: count // 2]])
        both = torch.cat(drawn)
        return both[torch.randperm(len(both), generator=generator)]

    def apply(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Manipulated images and labels."""
        return x, self.first + self.second - y

    def test(self, x: Tensor, y: Tensor) -> Data:
        """All test images; those of the two classes are affected."""
        affected = ((y == self.first) | (y == self.second)).long().tolist()
        return Data((x, y), columns={"affected": affected})


def manipulated(
    manipulation: Patch | Confusion, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor],
    count: int, seed: int = 0,
) -> Splits:  # fmt: skip
    """Manipulate some training samples, in an order that a share of them is found in.

    Args:
        manipulation: what is done.
        train: clean images and labels.
        test: the same to test on.
        count: how many samples are manipulated.
        seed: of the choice and the order.
    """
    (x, y), generator = (t.clone() for t in train), torch.Generator().manual_seed(seed)
    chosen = manipulation.choose(y, count, generator)
    true = y.clone()
    x[chosen], y[chosen] = manipulation.apply(x[chosen], y[chosen])
    order = torch.zeros(len(y), dtype=torch.long)
    order[chosen] = torch.arange(1, len(chosen) + 1)
    columns = {"manipulated": order.tolist(), "true": true.tolist()}
    return Splits(Data((x, y), columns=columns), manipulation.test(*test))


def found(share: float, count: int) -> Request:
    """A request to forget the share of the manipulated samples that was found.

    Raises:
        SettingError: no sample was found, or the share is above 1.
    """
    known = round(share * count)
    if not 0 < known <= count:
        raise SettingError(f"a share of {share:g} of {count} manipulated samples is none or too many")  # fmt: skip
    return Request(where=f"manipulated > 0 and manipulated <= {known}")


@functools.cache
def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images / 16.0).float().reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    train, test = (torch.from_numpy(p) for p in stratified(labels, SIZES, seed=0))
    return (x[train], y[train]), (x[test], y[test])


POISONED, CONFUSED = 60, 120


@functools.cache
def poisoned() -> Splits:
    """60 of 1,200 digits with a bright square, called zero."""
    return manipulated(Patch(), *_digits(), POISONED)


@functools.cache
def confused() -> Splits:
    """60 threes called five and 60 fives called three, of 1,200 digits."""
    return manipulated(Confusion(3, 5), *_digits(), CONFUSED)


def recipe(train: Data) -> ClassifierRecipe:
    """A small convolutional network, Adam, 25 passes."""
    return ClassifierRecipe(
        DigitsCNN, train, epochs=25, lr=1e-3, batch_size=64, step="adam", weight_decay=0.0
    )


_TUNED = {"finetune": {"epochs": 5, "lr": 1e-3, "step": "adam", "batch_size": 64}}

digits_poison = Workload(
    name="digits-poison",
    title="undo a backdoor of which half the samples are known (1,797 digits)",
    data=poisoned,
    recipe=recipe,
    request=found(0.5, POISONED),
    tuned=_TUNED,
    tuning="the card's small run",
)
digits_confusion = Workload(
    name="digits-confusion",
    title="undo the confusion of two classes of which half the samples are known (1,797 digits)",
    data=confused,
    recipe=recipe,
    request=found(0.5, CONFUSED),
    tuned=_TUNED,
    tuning="the card's small run",
)

"""Poisoned copies of the forget data: other labels, and patches of another class pasted in.

What is pasted and where is decided once for every sample; the copies themselves are made batch by
batch, so that only patches are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expunge.core.data import Batch
from expunge.core.errors import DataError, NeedsError, SettingError
from expunge.core.runtime import Runtime
from expunge.core.view import Source
from expunge.train.inputs import continuous
from expunge.train.relabel import relabelled

Labeller = Literal["targeted", "random", "keep", "second-best"]


@dataclass(frozen=True)
class Poison:
    """What stands for each forget sample.

    Attributes:
        ids: sorted ids [n].
        labels: their labels from now on [n].
        patches: M squares for each, [n, M, C, s, s]; None leaves the inputs as they are.
        centres: where they go, (row, column) [n, M, 2].
    """

    ids: Tensor
    labels: Tensor
    patches: Tensor | None = None
    centres: Tensor | None = None

    def apply(self, batch: Batch) -> Batch:
        """Poison a batch of forget samples; later patches cover earlier ones."""
        batch = relabelled(batch, self.ids, self.labels)
        if self.patches is None or self.centres is None:
            return batch
        places = torch.searchsorted(self.ids, batch.ids.cpu())
        pixels, rebuilt = images_of(batch, "the poisoner")
        for one in range(self.patches.shape[1]):
            pixels = paste(pixels, self.patches[places, one], self.centres[places, one])
        return rebuilt(pixels)


def new_labels(
    labeller: Labeller,
    count: int,
    *,
    classes: int,
    true: Tensor | None = None,
    donors: Tensor | None = None,
    logits: Tensor | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Labels [n] for poisoned samples.

    Args:
        labeller: `targeted`: the donor class; `random`: uniform over all classes, the true one
            included; `keep`: unchanged; `second-best`: the likeliest class but the true one.
        count: n.
        classes: C.
        true: labels [n], for `keep` and `second-best`.
        donors: class numbers [n], for `targeted`.
        logits: of the original model [n, C], for `second-best`.
        generator: for `random`.
    """
    if labeller == "random":
        return torch.randint(classes, (count,), generator=generator)
    if labeller == "targeted":
        assert donors is not None
        return donors
    assert true is not None
    if labeller == "keep":
        return true
    assert logits is not None
    own = torch.arange(classes) == true[:, None]
    return logits.masked_fill(own, -torch.inf).argmax(1)


def donor_classes(
    who: str, true: Tensor, kept: Tensor, *, donor: int | None, logits: Tensor | None
) -> dict[int, int]:
    """Donor class of each class to forget: the one given, or the one it is most confused with.

    Args:
        who: the method that asks, for messages.
        true: labels of the forget samples [n].
        kept: labels of the retain samples; a donor has at least one.
        donor: the class given, if any.
        logits: of the original model on the forget samples [n, C]; the donor is the class, other
            than their own, of the largest mean probability.

    Raises:
        SettingError: the class given is to be forgotten itself.
        NeedsError: the retain data has no sample of a donor class.
    """
    known, chosen = kept.unique(), {}
    for label in true.unique().tolist():
        others = known[known != label]
        if donor == label:
            raise SettingError(f"donor={donor} is a class of the forget data; choose another one")
        if not len(others) or (donor is not None and donor not in others.tolist()):
            raise NeedsError(
                f"{who} takes patches or labels from a donor class, and the retain data has "
                f"{'no other class' if donor is None else f'no sample of class {donor}'}"
            )
        if donor is None:
            assert logits is not None
            chance = logits[true == label].softmax(1).mean(0)[others]
            chosen[label] = int(others[chance.argmax()])
        else:
            chosen[label] = donor
    return chosen


def draw_donors(source: Source, labels: Tensor, donors: Tensor, runtime: Runtime) -> Tensor:
    """Ids [n] of images to take patches from, each of its donor class, with replacement.

    Args:
        source: side of the data they are drawn from.
        labels: its labels.
        donors: class numbers [n].
        runtime: gives the generator.
    """
    drawn = torch.zeros(len(donors), dtype=torch.long)
    for label in donors.unique().tolist():
        ids, wanted = source.ids[labels == label], donors == label
        generator = runtime.generator("donor", label)
        drawn[wanted] = ids[torch.randint(len(ids), (int(wanted.sum()),), generator=generator)]
    return drawn


def few_a_class(source: Source, most: int, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Draw at most so many samples of each class; their sorted ids [n] and labels [n]."""
    labels = source.labels()
    order = torch.randperm(len(labels), generator=runtime.generator("few"))
    taken = [order[labels[order] == c][:most] for c in labels.unique()]
    places = torch.cat(taken).sort().values
    return source.ids[places], labels[places]


def gathered(
    source: Source,
    ids: Tensor,
    compute: Callable[[Batch], Tensor],
    runtime: Runtime,
    *,
    size: int = 64,
) -> Tensor:
    """Compute one row for each of some samples, whatever process read it.

    Args:
        source: their side of the data.
        ids: sorted unique ids [n], at least one.
        compute: rows [B, …] of a batch; no gradient is kept.
        runtime: puts the shares of several processes together.
        size: samples a batch.

    Returns:
        Rows [n, …] on CPU in the order of `ids`.
    """
    whole: Tensor | None = None
    for chunk in ids.split(size):
        batch = source.fetch(chunk)
        with torch.no_grad():
            rows = compute(batch)
        if whole is None:
            whole = rows.new_zeros(len(ids), *rows.shape[1:])
        whole[torch.searchsorted(ids, batch.ids.cpu()).to(whole.device)] = rows
    assert whole is not None
    return runtime.sum(whole).cpu()


def images_of(batch: Batch, who: str) -> tuple[Tensor, Callable[[Tensor], Batch]]:
    """The images [B, C, H, W] of a batch and the way back.

    Raises:
        DataError: the inputs are no images.
    """
    inputs = [batch.x] if isinstance(batch.x, Tensor) else list(batch.x.values())
    if len(inputs) != 1 or inputs[0].ndim != 4 or not inputs[0].is_floating_point():
        shape = ", ".join(str(["B", *t.shape[1:]]).replace("'", "") for t in inputs)
        raise DataError(
            f"{who} pastes patches into images [B, C, H, W] of real numbers, and this data has "
            f"{shape}; use poisoner=none, which changes labels only"
        )
    return continuous(batch, who)


def crop(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Squares [B, C, side, side] around centres [B, 2], moved inside where they would stick out."""
    rows, columns = _pixels(images, centres, side)
    picked = torch.arange(len(images), device=images.device)[:, None, None]
    return images[picked, :, rows, columns].permute(0, 3, 1, 2)


def paste(images: Tensor, patches: Tensor, centres: Tensor) -> Tensor:
    """Return images with squares [B, C, s, s] around centres [B, 2], all of each inside."""
    rows, columns = _pixels(images, centres, patches.shape[-1])
    picked = torch.arange(len(images), device=images.device)[:, None, None]
    pasted = images.clone()
    pasted[picked, :, rows, columns] = patches.permute(0, 2, 3, 1).to(images)
    return pasted


def _pixels(images: Tensor, centres: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Rows [B, side, 1] and columns [B, 1, side] of squares of the images."""
    height, width = images.shape[-2:]
    if not 1 <= side <= min(height, width):
        raise DataError(f"a patch of {side} pixels does not fit an image of {height}×{width}")
    most = torch.tensor([height - side, width - side])
    corners = (centres.cpu() - side // 2).clamp_min(0).minimum(most).to(images.device)
    reach = torch.arange(side, device=images.device)
    return (corners[:, :1] + reach)[:, :, None], (corners[:, 1:] + reach)[:, None, :]

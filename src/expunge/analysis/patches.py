r"""Where in an image a concept is: every window is encoded by itself and compared with its vector.

A window of side w at corner (r, c) is resized to the whole image's size and encoded; the map holds
\(\cos(\varphi(\mathrm{window}), v)\). Nothing is covered up, so no baseline colour is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from expunge.core.errors import DataError


@dataclass(frozen=True)
class Windows:
    """Square windows of an image on a grid.

    Attributes:
        height: of the image, in pixels.
        width: of the image.
        side: of a window.
        stride: pixels between two windows.
    """

    height: int
    width: int
    side: int
    stride: int

    def __post_init__(self) -> None:
        """Check that a window fits; raises `DataError`."""
        if not 1 <= self.side <= min(self.height, self.width) or self.stride < 1:
            raise DataError(
                f"a window of {self.side} pixels does not fit an image of {self.height}×{self.width}"
            )

    @property
    def corners(self) -> Tensor:
        """Upper left corners (row, column) [N, 2], row by row."""
        rows = torch.arange(0, self.height - self.side + 1, self.stride)
        columns = torch.arange(0, self.width - self.side + 1, self.stride)
        return torch.cartesian_prod(rows, columns)

    def cut(self, images: Tensor) -> Tensor:
        """All windows [B, N, C, side, side] of images [B, C, H, W]."""
        grid = images.unfold(2, self.side, self.stride).unfold(3, self.side, self.stride)
        return grid.flatten(2, 3).transpose(1, 2)

    def centres(self, places: Tensor) -> Tensor:
        """Centres (row, column) [B, 2] of windows by their number [B], in pixels."""
        return self.corners[places.cpu()] + self.side // 2


@torch.no_grad()
def similarity_map(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    vectors: Tensor,
    windows: Windows,
    *,
    chunk: int = 512,
) -> Tensor:
    """Cosine of every window's features with concept vectors.

    Args:
        encode: features [n, d] of images [n, C, H, W].
        images: [B, C, H, W].
        vectors: concepts [K, d].
        windows: the grid.
        chunk: windows encoded at a time.

    Returns:
        Similarities [B, K, N] in single precision, N windows row by row.
    """
    cut = windows.cut(images)
    count = cut.shape[1]
    found = []
    for part in cut.flatten(0, 1).split(chunk):
        whole = resized(part, windows.height, windows.width)
        features = encode(whole).float()
        found.append(cosine_similarity(features[:, None], vectors.to(features)[None], dim=2))
    return torch.cat(found).view(len(images), count, len(vectors)).transpose(1, 2)


def locate_peak(similarities: Tensor, windows: Windows) -> Tensor:
    """Centre (row, column) [B, 2] of the most similar window of maps [B, N]."""
    return windows.centres(similarities.argmax(1))


def concept_centres(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    vectors: Mapping[int, Tensor],
    windows: Windows,
) -> Tensor:
    """Where the concepts of each image's class are.

    Args:
        encode: features [n, d] of images [n, C, H, W].
        images: [B, C, H, W].
        labels: class numbers [B].
        vectors: concepts [M, d] by class, the same M for all.
        windows: the grid.

    Returns:
        Centres (row, column) [B, M, 2] on CPU.
    """
    count = len(next(iter(vectors.values())))
    centres = torch.zeros(len(images), count, 2, dtype=torch.long)
    for label in labels.unique().tolist():
        of = labels == label
        maps = similarity_map(encode, images[of], vectors[label], windows)
        centres[of.cpu()] = locate_peak(maps.flatten(0, 1), windows).view(-1, count, 2)
    return centres


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Images [B, C, height, width], bilinear; unchanged if they have that size."""
    if images.shape[-2:] == (height, width):
        return images
    small = min(height, width) < min(images.shape[-2:])
    return interpolate(images, (height, width), mode="bilinear", antialias=small)

"""Invariant 3 of the card concept-poison, the part about finding the place."""

from __future__ import annotations

import pytest
import torch

import expunge as xp
from expunge.analysis.patches import (
    Windows,
    concept_centres,
    locate_peak,
    resized,
    similarity_map,
)


@pytest.mark.parametrize(
    ("size", "side", "stride"), [((8, 8), 2, 1), ((12, 9), 4, 2), ((5, 7), 5, 3)]
)
def test_concept_poison_invariant_3_peak_of_a_one_hot_map(size, side, stride):
    windows = Windows(*size, side, stride)
    maps = torch.eye(len(windows.corners))
    centres = locate_peak(maps, windows)
    torch.testing.assert_close(centres, windows.corners + side // 2)
    image = torch.arange(size[0] * size[1]).view(1, 1, *size).float()
    cut = windows.cut(image)[0]
    assert len(cut) == len(windows.corners)
    for (row, column), window in zip(windows.corners.tolist(), cut, strict=True):
        assert torch.equal(window, image[0, :, row : row + side, column : column + side])


def corners_mean(x):
    """Features of an image: mean of its left and of its right half, and of the whole."""
    left, right = x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))
    return torch.stack([left, right, torch.ones_like(left)], 1)


def test_similarity_is_the_cosine_of_each_window():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 2, 8, 8, generator=generator)
    vectors = torch.tensor([[1.0, 0, 0], [1.0, -1.0, 0.5]])
    windows = Windows(8, 8, 3, 2)
    maps = similarity_map(corners_mean, images, vectors, windows, chunk=5)
    assert maps.shape == (3, 2, len(windows.corners))
    for b in range(3):
        for n, (row, column) in enumerate(windows.corners.tolist()):
            window = images[b : b + 1, :, row : row + 3, column : column + 3]
            features = corners_mean(resized(window, 8, 8))[0]
            for k, v in enumerate(vectors):
                cosine = features @ v / features.norm() / v.norm()
                assert float(maps[b, k, n]) == pytest.approx(float(cosine), abs=1e-5)


def test_each_image_is_searched_for_its_own_class():
    """A bright and a dark spot; the concept of class 0 is brightness, of class 1 darkness."""
    images = torch.full((4, 1, 8, 8), 0.5)
    spots = [(1, 5), (4, 2), (6, 6), (2, 2)]
    for image, (row, column) in zip(images, spots, strict=True):
        image[0, row - 1 : row + 1, column - 1 : column + 1] = 1.0
        image[0, 7 - row : 9 - row, 7 - column : 9 - column] = 0.0

    def encode(x):
        return torch.stack([x.mean((1, 2, 3)), torch.full((len(x),), 0.5)], 1)

    vectors = {0: torch.tensor([[1.0, 0.0]]), 1: torch.tensor([[-1.0, 0.0]])}
    labels = torch.tensor([0, 1, 0, 1])
    found = concept_centres(encode, images, labels, vectors, Windows(8, 8, 2, 1))
    assert found.shape == (4, 1, 2)
    wanted = [
        s if y == 0 else (8 - s[0], 8 - s[1]) for s, y in zip(spots, labels.tolist(), strict=True)
    ]
    assert found[:, 0].tolist() == [list(w) for w in wanted]


def test_a_window_that_does_not_fit_is_refused():
    for windows in ((8, 4, 5, 1), (8, 8, 0, 1), (8, 8, 2, 0)):
        with pytest.raises(xp.UserError, match="does not fit"):
            Windows(*windows)

"""MNIST with a tenth of its training labels shuffled; the mislabelled samples are to be forgotten."""

from __future__ import annotations

import functools

import torch

from expunge.core.data import Data
from expunge.core.request import Request
from expunge.workloads import mnist
from expunge.workloads.base import Splits, Workload

SHARE = 0.1


@functools.cache
def splits() -> Splits:
    """The splits of `mnist`, with the labels of 400 training samples permuted among themselves.

    The column `mislabelled` says whose label is not the true one; by chance about a tenth of the
    permuted labels stay right, and those samples count as clean.
    """
    clean = mnist.splits()
    ids = clean.train.ids.sort().values
    true = clean.train.labels_of(ids)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(ids), generator=generator)[: round(SHARE * len(ids))]
    labels = true.clone()
    labels[drawn] = true[drawn[torch.randperm(len(drawn), generator=generator)]]
    images = clean.train.fetch(ids).x
    wrong = (labels != true).long().tolist()
    return Splits(Data((images, labels), ids=ids, columns={"mislabelled": wrong}), clean.test)


mnist_mislabelled = Workload(
    name="mnist-mislabelled",
    title="forget the mislabelled tenth of 5,000 MNIST images (small ResNet)",
    data=splits,
    recipe=mnist.recipe,
    request=Request(where="mislabelled == 1"),
    tuned=mnist.ANY,
    tuning="not tuned: settings of a perceptron",
    package="expunge[workloads]",
)

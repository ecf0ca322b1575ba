"""The corrupted workload: what is to be forgotten is exactly what is wrong."""

from __future__ import annotations

from expunge.workloads import mnist, registry


def test_forgets_exactly_the_wrong_labels():
    workload = registry.get("mnist-mislabelled")
    data, clean = workload.data().train, mnist.splits().train
    forget = workload.request.resolve(data)
    kept = data.without(forget)
    assert bool((data.labels_of(forget) != clean.labels_of(forget)).all())
    assert bool((data.labels_of(kept) == clean.labels_of(kept)).all())
    assert 300 <= len(forget) <= 400


def test_permuted_so_that_class_sizes_stay():
    data, clean = registry.get("mnist-mislabelled").data().train, mnist.splits().train
    assert data.labels.bincount().equal(clean.labels.bincount())

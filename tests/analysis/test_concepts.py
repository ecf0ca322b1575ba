"""Invariant 2 of the card concept-poison: concept values, and the classifier on them."""

from __future__ import annotations

import pytest
import torch

import expunge as xp
from expunge.analysis.concepts import (
    ConceptBank,
    bottleneck,
    cav,
    class_concepts,
    concept_bank,
    load_bank,
)


@pytest.fixture(scope="module")
def planted():
    """Four classes in 12 dimensions; class c has concept c, which is the axis c."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    features = 0.5 * torch.randn(200, 12, generator=generator)
    features[torch.arange(200), labels] += 3
    return features, labels


@pytest.fixture(scope="module")
def bank(planted):
    features, labels = planted
    return concept_bank({
        f"axis {c}": (features[labels == c], features[labels != c]) for c in range(4)
    })


def test_cav_is_the_normal_between_the_sides(planted, bank):
    features, labels = planted
    for c in range(4):
        v = bank.vector(f"axis {c}")
        assert float(v.norm()) == pytest.approx(1)
        assert int(v.argmax()) == c
        between = features[labels == c].mean(0) - features[labels != c].mean(0)
        assert float(v @ between / between.norm()) > 0.8
        inside = bank.values(features)[:, c] > 0  # the offset puts the border between the sides
        assert float((inside == (labels == c)).float().mean()) > 0.95


def test_concept_poison_invariant_2_values_are_signed_distances(planted, bank):
    features, _ = planted
    wanted = torch.stack([features @ v + b for v, b in zip(bank.vectors, bank.offsets, strict=True)], 1)  # fmt: skip
    torch.testing.assert_close(bank.values(features), wanted)


def test_concept_poison_invariant_2_scaling_a_cav_changes_nothing(planted):
    features, labels = planted
    v, b = cav(features[labels == 0], features[labels != 0])
    assert b != 0
    plain = ConceptBank.of({"a": v}, {"a": b}).values(features)
    for scale in (0.01, 7.0, 1e4):
        scaled = ConceptBank.of({"a": v * scale}, {"a": b * scale}).values(features)
        torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)
    given = [ConceptBank.of({"a": v * s}).values(features) for s in (1.0, 7.0)]
    torch.testing.assert_close(*given)


def test_concept_poison_invariant_2_scores_are_linear(planted, bank):
    features, labels = planted
    found = bottleneck(bank, features, labels)
    a, b = features[:1], features[1:2]
    mixed = found.scores(0.3 * a + 0.7 * b)
    torch.testing.assert_close(mixed, 0.3 * found.scores(a) + 0.7 * found.scores(b))
    added = found.contributions(features, 2)
    torch.testing.assert_close(
        added.sum(1) + found.bias[2], found.scores(features)[:, 2], rtol=1e-4, atol=1e-3
    )


def test_concept_poison_invariant_2_zeroing_a_weight_takes_its_contribution(planted, bank):
    from dataclasses import replace

    features, labels = planted
    found = bottleneck(bank, features, labels)
    weights = found.weights.clone()
    weights[1, 3] = 0
    without = replace(found, weights=weights)
    change = found.scores(features) - without.scores(features)
    wanted = found.weights[1, 3] * bank.values(features)[:, 3]
    torch.testing.assert_close(change[:, 1], wanted, rtol=1e-4, atol=1e-3)
    assert bool((change[:, [0, 2, 3]] == 0).all())
    torch.testing.assert_close(found.contributions(features, 1)[:, 3], wanted)


def test_concept_poison_invariant_2_sparsity_grows_with_the_penalty(planted, bank):
    features, labels = planted
    shares = [
        bottleneck(bank, features, labels, penalty=p, l1_ratio=1.0).sparsity
        for p in (1e-6, 1e-2, 5e-2, 2.0)
    ]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0 < shares[2] < 1
    assert shares[-1] == 1
    ridge = bottleneck(bank, features, labels, penalty=5e-2, l1_ratio=0.0)
    assert ridge.sparsity == 0  # it is the ℓ1 part that sets weights to zero


def test_ranking_finds_the_planted_concepts(planted, bank):
    features, labels = planted
    found = bottleneck(bank, features, labels)
    assert float((found.predict(features) == labels).float().mean()) > 0.95
    for c in range(4):
        names, weights = zip(*found.ranking(c), strict=True)
        assert names[0] == f"axis {c}"
        assert list(weights) == sorted(weights, reverse=True)


def test_two_classes_have_a_row_each(planted, bank):
    features, labels = planted
    two = labels < 2
    found = bottleneck(bank, features[two], labels[two] + 5)
    assert found.classes == (5, 6)
    assert [found.ranking(c)[0][0] for c in (5, 6)] == ["axis 0", "axis 1"]
    assert float((found.predict(features[two]) == labels[two] + 5).float().mean()) > 0.95


def test_concepts_of_a_class(planted, bank):
    features, labels = planted
    alone = class_concepts(features, labels, [1])
    assert alone[1][0] == ["class 1"]
    assert int(alone[1][1][0].argmax()) == 1
    ranked = class_concepts(features, labels, [1, 3], bank=bank, top=2)
    assert [ranked[c][0][0] for c in (1, 3)] == ["axis 1", "axis 3"]
    assert ranked[1][1].shape == (2, 12)
    torch.testing.assert_close(ranked[3][1][0], bank.vector("axis 3"))
    chosen = class_concepts(features, labels, [1], bank=bank, named="axis 0")
    assert chosen[1][0] == ["axis 0"]


def test_bank_comes_back_from_disk(tmp_path, bank, planted):
    bank.save(tmp_path / "bank.safetensors")
    again = load_bank(tmp_path / "bank.safetensors")
    assert set(again.names) == set(bank.names)
    for name in bank.names:
        torch.testing.assert_close(again.vector(name), bank.vector(name))
    order = [again.names.index(n) for n in bank.names]
    torch.testing.assert_close(again.values(planted[0])[:, order], bank.values(planted[0]))


def test_bank_of_given_vectors_needs_no_offsets(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.tensor([3.0, 4.0])}, str(tmp_path / "given.safetensors"))
    given = load_bank(tmp_path / "given.safetensors")
    torch.testing.assert_close(given.values(torch.tensor([[1.0, 1.0]])), torch.tensor([[1.4]]))


def test_what_is_wrong_with_a_bank_is_named(tmp_path, bank, planted):
    (tmp_path / "no.safetensors").write_text("none")
    for path in ("no.safetensors", "missing.safetensors"):
        with pytest.raises(xp.UserError, match=path):
            load_bank(tmp_path / path)
    with pytest.raises(xp.UserError, match="zero"):
        ConceptBank.of({"a": torch.zeros(3)})
    with pytest.raises(xp.UserError, match="same size"):
        ConceptBank.of({"a": torch.ones(3), "b": torch.ones(4)})
    with pytest.raises(xp.UserError, match="at least one"):
        ConceptBank.of({})
    with pytest.raises(xp.UserError, match="12 dimensions"):
        bank.values(torch.ones(2, 5))
    with pytest.raises(xp.UserError, match="no concept 'tail'"):
        bank.vector("tail")
    with pytest.raises(xp.UserError, match="one example"):
        cav(torch.ones(3, 2), torch.ones(0, 2))
    with pytest.raises(xp.ExpungeError, match="NaN"):
        cav(torch.full((3, 2), torch.nan), torch.ones(3, 2))
    with pytest.raises(xp.UserError, match="two classes"):
        bottleneck(bank, planted[0], torch.zeros(200, dtype=torch.long))


def test_one_example_a_side_is_enough():
    v, _ = cav(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    assert float(v[0]) > 0
    assert float(v[1]) == pytest.approx(0, abs=1e-6)

r"""Concepts as directions in feature space, and a classifier that sees nothing but them.

A concept activation vector (CAV, Kim et al. 2018, arXiv 1711.11279) is the normal \(v_k\) of a
linear SVM between features of examples with and without the concept. The value of concept k is
the signed distance \(p_k = (\langle\varphi, v_k\rangle + b_k) / \|v_k\|\). A post-hoc concept
bottleneck (Yuksekgonul et al. 2023, arXiv 2205.15480) is a sparse linear classifier of p: its
weights rank the concepts of a class. It explains a model; it does not replace it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core.errors import DataError, ExpungeError, SettingError

MARGINS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Values of the SVM's C among which held-out examples choose."""


@dataclass(frozen=True)
class ConceptBank:
    """Unit vectors of K concepts in a feature space of d dimensions.

    Attributes:
        names: of the concepts, unique.
        vectors: v [K, d], each of length 1.
        offsets: b / ‖v‖ [K]; 0 for concepts that come without examples, such as text embeddings.
    """

    names: tuple[str, ...]
    vectors: Tensor
    offsets: Tensor

    @classmethod
    def of(
        cls, vectors: Mapping[str, Tensor], offsets: Mapping[str, float] | None = None
    ) -> ConceptBank:
        """Make a bank of given vectors of any length.

        Args:
            vectors: one [d] a name.
            offsets: b in the units of its vector; 0 where there is none.

        Returns:
            The bank.

        Raises:
            DataError: there is none, they differ in size, or one is zero or not finite.
        """
        if not vectors:
            raise DataError("a concept bank needs at least one vector")
        rows = [torch.as_tensor(v).detach().cpu().double().flatten() for v in vectors.values()]
        if len({len(v) for v in rows}) != 1:
            raise DataError("the vectors of a concept bank must all have the same size")
        stacked = torch.stack(rows)
        lengths = stacked.norm(dim=1)
        if not bool((torch.isfinite(lengths) & (lengths > 0)).all()):
            raise DataError("a concept vector is zero, NaN or infinite")
        shifts = torch.tensor([(offsets or {}).get(n, 0.0) for n in vectors], dtype=torch.float64)
        return cls(tuple(vectors), (stacked / lengths[:, None]).float(), (shifts / lengths).float())

    def __len__(self) -> int:
        """Return the number of concepts."""
        return len(self.names)

    def values(self, features: Tensor) -> Tensor:
        """Concept values p [B, K] of features [B, d], as signed distances.

        Raises:
            DataError: the features are of another space.
        """
        if features.ndim != 2 or features.shape[1] != self.vectors.shape[1]:
            raise DataError(
                f"concepts of {self.vectors.shape[1]} dimensions do not fit features of shape "
                f"{tuple(features.shape)}"
            )
        features = features.float()
        return features @ self.vectors.to(features).T + self.offsets.to(features)

    def vector(self, name: str) -> Tensor:
        """Unit vector [d] of one concept.

        Raises:
            SettingError: there is none of that name.
        """
        if name not in self.names:
            raise SettingError(f"no concept {name!r}; the bank has {', '.join(self.names)}")
        return self.vectors[self.names.index(name)]

    def save(self, path: Path | str) -> None:
        """Write the bank as safetensors: vectors by name, offsets as `NAME/offset`."""
        from safetensors.torch import save_file

        tensors = {n: self.vectors[i].clone() for i, n in enumerate(self.names)}
        tensors |= {f"{n}/offset": self.offsets[i].clone() for i, n in enumerate(self.names)}
        save_file(tensors, str(path))


def load_bank(path: Path | str) -> ConceptBank:
    """Read vectors [d] by concept name from a safetensors file; `NAME/offset` holds an offset.

    Raises:
        DataError: the file cannot be read or holds no vectors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} cannot be read as a concept bank (safetensors): {error}"
        ) from error
    vectors = {n: t for n, t in tensors.items() if not n.endswith("/offset")}
    offsets = {n: float(tensors[f"{n}/offset"]) for n in vectors if f"{n}/offset" in tensors}
    return ConceptBank.of(vectors, offsets)


def cav(positive: Tensor, negative: Tensor, *, margin: float | None = None) -> tuple[Tensor, float]:
    """Normal and offset of the linear SVM between two groups of features.

    Args:
        positive: features [n, d] of examples with the concept.
        negative: features [m, d] of examples without it.
        margin: the SVM's C; None takes the one that does best on every fifth example, held out.

    Returns:
        v [d] and b, pointing towards the positive side.

    Raises:
        DataError: a side is empty.
        ExpungeError: features are NaN or infinite.
    """
    if not len(positive) or not len(negative):
        raise DataError("a concept needs at least one example with it and one without it")
    x = torch.cat([positive, negative]).detach().cpu().double()
    if not bool(torch.isfinite(x).all()):
        raise ExpungeError("the model gives NaN or infinite features, so no concept can be found")
    y = np.repeat([1, 0], [len(positive), len(negative)])
    held = np.zeros(len(y), dtype=bool)
    for side in (1, 0):
        held[np.flatnonzero(y == side)[4::5]] = True
    chosen = margin
    if chosen is None and len(set(y[held])) == 2:
        scores = [
            _svm(x.numpy()[~held], y[~held], c).score(x.numpy()[held], y[held]) for c in MARGINS
        ]
        chosen = MARGINS[int(np.argmax(scores))]
    model = _svm(x.numpy(), y, 0.1 if chosen is None else chosen)
    return torch.from_numpy(model.coef_[0]).float(), float(model.intercept_[0])


def concept_bank(examples: Mapping[str, tuple[Tensor, Tensor]]) -> ConceptBank:
    """Bank of CAVs.

    Args:
        examples: features of examples with [n, d] and without [m, d] each concept.
    """
    found = {name: cav(*sides) for name, sides in examples.items()}
    return ConceptBank.of(
        {n: v for n, (v, _) in found.items()}, {n: b for n, (_, b) in found.items()}
    )


@dataclass(frozen=True)
class Bottleneck:
    r"""Class scores \(s = W p + c\) of concept values.

    Attributes:
        bank: the concepts.
        classes: class numbers, one a row.
        weights: W [C, K].
        bias: c [C].
    """

    bank: ConceptBank
    classes: tuple[int, ...]
    weights: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """Class scores [B, C] of features [B, d]."""
        values = self.bank.values(features)
        return values @ self.weights.to(values).T + self.bias.to(values)

    def predict(self, features: Tensor) -> Tensor:
        """Class numbers [B]."""
        return torch.tensor(self.classes)[self.scores(features).argmax(1).cpu()]

    def contributions(self, features: Tensor, label: int) -> Tensor:
        """What each concept adds to the score of a class [B, K]."""
        values = self.bank.values(features)
        return values * self.weights[self._row(label)].to(values)

    def ranking(self, label: int) -> list[tuple[str, float]]:
        """Concepts of a class with their weights, the one that speaks most for it first."""
        weights = self.weights[self._row(label)].tolist()
        return sorted(zip(self.bank.names, weights, strict=True), key=lambda item: -item[1])

    @property
    def sparsity(self) -> float:
        """Share of the weights that are exactly 0."""
        return float(self.weights.eq(0).float().mean())

    def _row(self, label: int) -> int:
        if label not in self.classes:
            raise SettingError(f"the bottleneck has no class {label}")
        return self.classes.index(label)


def bottleneck(
    bank: ConceptBank,
    features: Tensor,
    labels: Tensor,
    *,
    penalty: float = 1e-5,
    l1_ratio: float = 0.99,
    seed: int = 0,
) -> Bottleneck:
    """Fit a sparse classifier of concept values: one logistic regression a class, by SGD.

    Args:
        bank: the concepts.
        features: [n, d].
        labels: class numbers [n].
        penalty: λ of the elastic net.
        l1_ratio: its ℓ1 share; the rest is ℓ2.
        seed: of the order of samples.

    Returns:
        The bottleneck.

    Raises:
        DataError: there are fewer than two classes.
        ExpungeError: features are NaN or infinite.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import SGDClassifier

    values = bank.values(features.detach()).cpu().double()
    if not bool(torch.isfinite(values).all()):
        raise ExpungeError("the model gives NaN or infinite features, so no concept can be ranked")
    if len(labels.unique()) < 2:
        raise DataError("a concept bottleneck needs samples of at least two classes")
    model = SGDClassifier(
        loss="log_loss", penalty="elasticnet", alpha=penalty, l1_ratio=l1_ratio, max_iter=2000,
        random_state=seed,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the ranking settles long before
        model.fit(values.numpy(), labels.cpu().numpy())
    weights, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(weights) == 1:  # of two classes only the second has a row
        weights, bias = torch.cat([-weights, weights]), torch.cat([-bias, bias])
    return Bottleneck(bank, tuple(map(int, model.classes_)), weights.float(), bias.float())


def class_concepts(
    features: Tensor,
    labels: Tensor,
    classes: Sequence[int],
    *,
    bank: ConceptBank | None = None,
    top: int = 1,
    named: str | None = None,
    seed: int = 0,
) -> dict[int, tuple[list[str], Tensor]]:
    """The concepts that speak most for each of some classes.

    Args:
        features: [n, d] of samples of these and other classes.
        labels: class numbers [n].
        classes: whose concepts.
        bank: a bottleneck over it ranks them; without one, a class is its own only concept: the
            CAV of its samples against the others.
        top: how many, M, at most those of the bank.
        named: the concept of the bank to take M times for each class, in place of the best ones.
        seed: of the bottleneck.

    Returns:
        Names and unit vectors [M, d] by class.
    """
    if bank is None:
        own = concept_bank({f"class {c}": _against(features, labels == c) for c in classes})
        return {c: ([f"class {c}"], own.vector(f"class {c}")[None]) for c in classes}
    if named is not None:
        ranked = {c: [named] * min(top, len(bank)) for c in classes}
    else:
        found = bottleneck(bank, features, labels, seed=seed)
        ranked = {c: [name for name, _ in found.ranking(c)[:top]] for c in classes}
    return {c: (names, torch.stack([bank.vector(n) for n in names])) for c, names in ranked.items()}


def _against(features: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a class, and as many of the others, evenly spaced."""
    others = features[~inside]
    count = min(len(others), int(inside.sum()))
    return features[inside], others[torch.linspace(0, len(others) - 1, count).long()]


def _svm(x: np.ndarray, y: np.ndarray, c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    model = LinearSVC(C=c, dual=True, max_iter=5000, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a direction near the best will do
        return model.fit(x, y)

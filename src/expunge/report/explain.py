"""What every finding is, its range, and where good lies: the words beside the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Explanation:
    """A finding in words.

    Attributes:
        label: a few words for headings and lists.
        meaning: what was measured, and its range.
        good: where good lies.
    """

    label: str
    meaning: str
    good: str


_SPLITS = {
    "forget-train": "the samples to be forgotten",
    "retain-train": "the training samples to be kept",
    "forget-test": "test samples of what is to be forgotten",
    "retain-test": "all other test samples",
}
_TOWARD = "Toward the reference: the same attack on retrained models."
_SHADOW = {
    "lira": "How well a likelihood-ratio attack with shadow models tells forgotten from unseen samples",
    "rmia": "How well an attack with shadow models and a population tells forgotten from unseen samples",
    "u-lira": "How well models that unlearned a sample with this method are told from models that never saw it",
}
_RANGE = {**_SPLITS, "forget-test": "test samples with targets that are to be forgotten"}
_SPLIT_LABELS = {
    "forget-train": "forget, train",
    "retain-train": "rest, train",
    "forget-test": "forget, test",
    "retain-test": "rest, test",
}
_SCORES = {
    "loss": "the log-probability of the true class",
    "confidence": "the probability of the true class",
    "entropy": "the negative entropy of the prediction",
    "modified-entropy": "the negative modified entropy, which also looks at the true class",
    "correctness": "whether the prediction is right",
}
_SIDE = " The raw AUC tells the side: above the reference they still look trained on, below it they stand out as erased."
_REFERENCE = "Toward the reference: what retrained models reach. Beyond it is over-forgetting."
_KEPT = "The reference or above."
_KEPT_ERROR = "The reference or below."
_ERROR = "Toward the reference: what retrained models reach. A larger error is over-forgetting."
_AMONG = "Down to the reference, which is the distance of retrained models to each other."
_AMONG_UP = "Up to the reference, which is the similarity of retrained models to each other."
_PRICE = "Down. A price, not a verdict."


def _known() -> dict[str, Explanation]:
    found: dict[str, Explanation] = {}
    for split, what in _SPLITS.items():
        found[f"accuracy/{split}"] = Explanation(
            _SPLIT_LABELS[split],
            f"Share of right predictions on {what}, 0 to 1.",
            _REFERENCE if split.startswith("forget") else _KEPT,
        )
    for split, what in _SPLITS.items():
        for kind, words in (("js", "Jensen–Shannon divergence, at most 0.69"), ("kl", "Kullback–Leibler divergence, without an upper end")):  # fmt: skip
            found[f"divergence/{kind}-{split}"] = Explanation(
                f"{kind.upper()} divergence, {split.replace('-', ' ')}",
                f"Distance of predictions on {what} to those of retrained models, in nats ({words}).",
                _AMONG,
            )
    found["prediction-matrix/test"] = Explanation(
        "prediction matrix",
        "Mean distance between the rows of the true × predicted matrix and those of retrained models, on test data, 0 to 1.",
        _AMONG,
    )
    for score, what in _SCORES.items():
        found[f"membership/auc-{score}"] = Explanation(
            "membership AUC" if score == "loss" else f"membership AUC, {score}",
            f"How well {what} tells forgotten from unseen samples: two-sided AUC, ½ (not at all) to 1 (perfectly)."
            + (_SIDE if score == "loss" else ""),
            "Toward the reference, not toward ½: retrained models may be told apart as well.",
        )
    for attacker, what in (("svc", "A support vector machine on the confidence"), ("logistic", "Logistic regression on the entropy")):  # fmt: skip
        found[f"membership/efficacy-{attacker}"] = Explanation(
            f"membership efficacy, {attacker}",
            f"{what}, fitted on kept training against kept test samples, calls this share of the forgotten samples unseen, 0 to 1.",
            _REFERENCE,
        )
    found["membership/attack-accuracy"] = Explanation(
        "membership attack accuracy",
        "Balanced accuracy of an attacker fitted to tell forgotten from unseen samples by their loss, ½ to 1.",
        "Toward the reference.",
    )
    for audit, what in _SHADOW.items():
        for variant in ("-online", "-offline") if audit != "u-lira" else ("",):
            label = f"{audit}{variant.replace('-', ' ')}"
            found[f"{audit}/auc{variant}"] = Explanation(
                f"AUC, {label}", f"{what}: two-sided AUC, ½ (not at all) to 1 (perfectly).", _TOWARD
            )
            found[f"{audit}/balanced-accuracy{variant}"] = Explanation(
                f"balanced accuracy, {label}",
                f"{what}: balanced accuracy at the attack's own threshold, ½ to 1.",
                _TOWARD,
            )
            for rate, percent in (("0.1", "10"), ("0.01", "1"), ("0.001", "0.1")):
                found[f"{audit}/tpr{variant}-at-{rate}"] = Explanation(
                    f"found at {percent} % false alarms, {label}",
                    f"{what}: share of the forgotten samples called while {percent} % of the samples never seen are, half of them for looking too much and half for looking too little like training data, 0 to 1.",
                    _TOWARD,
                )
    for kind, words in (("mae", "Mean absolute error"), ("rmse", "Root mean squared error")):
        for split, what in _RANGE.items():
            found[f"regression-error/{kind}-{split}"] = Explanation(
                f"{'error' if kind == 'mae' else 'RMSE'}: {_SPLIT_LABELS[split]}",
                f"{words} on {what}, 0 upward, in the unit of the targets.",
                _ERROR if split.startswith("forget") else _KEPT_ERROR,
            )
    for what, words in (
        ("predictions", "Wasserstein distance of the distribution of predictions on the forgotten samples to those of retrained models, in the unit of the targets."),
        ("errors", "The same distance of the distribution of prediction minus target."),
        ("relative", "Mean difference of the prediction for each forgotten sample to that of retrained models, relative to its target."),
    ):  # fmt: skip
        label = (
            "relative difference of predictions"
            if what == "relative"
            else f"distance of {what}, forget train"
        )
        found[f"wasserstein/{what}-forget-train"] = Explanation(label, words, _AMONG)
    found["residual-membership/auc"] = Explanation(
        "membership AUC, residual",
        "How well the size of the residual tells forgotten from unseen samples with such targets: two-sided AUC, ½ (not at all) to 1 (perfectly)."
        + _SIDE,
        "Toward the reference, not toward ½: retrained models may be told apart as well.",
    )
    found["residual-membership/svc"] = Explanation(
        "called a member, svc",
        "A support vector machine on the loss, fitted on kept training against kept test samples, calls this share of the forgotten samples members, 0 to 1.",
        "Toward the reference, not toward 0.",
    )
    for suffix, more in (("", ""), ("-shifted", ", where the unseen samples' scores may be bent, as for harder records")):  # fmt: skip
        side = ", shifted" if suffix else ""
        found[f"memorised-fraction/limit{suffix}"] = Explanation(
            f"still memorised, at most{side}",
            f"At most this share of the samples to be forgotten is still memorised (95 %), 0 to 1{more}.",
            _REFERENCE,
        )
        found[f"memorised-fraction/estimate{suffix}"] = Explanation(
            f"still memorised, estimate{side}",
            f"The likeliest share of the samples to be forgotten that score as memorised ones do, 0 to 1{more}.",
            _REFERENCE,
        )
    found["memorised-fraction/erased"] = Explanation(
        "scored below unseen samples",
        "Share of the samples to be forgotten that score below 95 % of the unseen ones: 0.05 by chance.",
        "Toward the reference; more is over-forgetting, which can be seen.",
    )
    found["memorised-fraction/self-test"] = Explanation(
        "memorised fraction, self-test",
        "Share of the limits that hold on populations of known fractions.",
        "Up to 0.95 and more.",
    )
    found["privacy-score/forget-train"] = Explanation(
        "privacy score (PS)",
        "How little the best threshold on entropy or confidence tells this model from a retrained one, 0 (at sight) to 1 (not at all).",
        "Up to the reference, which is the score of retrained models against each other; not to 1.",
    )
    for split, what in _SPLITS.items():
        found[f"klom/{split}"] = Explanation(
            f"KLoM, {_SPLIT_LABELS[split]}",
            f"Divergence of the margins of a method's models from those of retrained ones on {what}, in nats, 0 to 11.5.",
            _AMONG,
        )
    found["relearn-time/updates"] = Explanation(
        "updates to relearn",
        "Mini-batch updates on all training data until the forgotten is known as well as to the original; capped.",
        "Toward the reference.",
    )
    found["relearn-time/ain"] = Explanation(
        "anamnesis index",
        "Updates to relearn over those of retrained models: far below 1 the information is still there, far above 1 it was pushed away.",
        "Toward 1.",
    )
    for what, words in (
        ("affected", "Accuracy with true labels where manipulated training data made the model wrong"),
        ("rest", "Accuracy with true labels everywhere else"),
        ("still-wrong", "Share of the known manipulated samples still called by the label they were given"),
    ):  # fmt: skip
        found[f"corrective/{what}"] = Explanation(
            f"corrected, {what.replace('-', ' ')}",
            f"{words}, 0 to 1.",
            "Down." if what == "still-wrong" else "Up; a model retrained without the known part is not the goal.",
        )  # fmt: skip
    found["nomus/score"] = Explanation(
        "NoMUS",
        "Mean of accuracy on other people and of how little forgotten people stand out from unseen ones, 0 to 1.",
        "No verdict: one answer for everything may score as high as the original; read the two parts.",
    )
    found["nomus/mia"] = Explanation(
        "forgotten against unseen people",
        "Accuracy of telling them apart by the model's loss, two-sided, ½ (not at all) to 1."
        + _SIDE,
        "Toward the reference, not toward ½: they are different people to a retrained model as well.",
    )
    found["nomus/accuracy-retain-test"] = Explanation(
        "accuracy on other people",
        "Share right on people the model was not trained on, 0 to 1.",
        _KEPT,
    )
    for side, queries in (("forget", "forgotten"), ("retain", "kept")):
        for end, how in (
            ("", "a few-shot classifier"),
            ("-prototype", "the nearest mean of the supports"),
        ):
            found[f"recovery/{side}{end}"] = Explanation(
                f"recovery, {queries} classes{', prototypes' if end else ''}",
                f"Accuracy of {how} over the frozen features on samples of {queries} classes, from a few labelled samples a class, 0 to 1.",
                "Toward the reference, not toward 0: a network that never saw a class tells it from others as well."
                if side == "forget"
                else _KEPT,
            )
    for score, words in (
        ("agl", "Agreement with retrained models in the accuracies of all splits"),
        ("agr", "Agreement with retrained models in features and what neighbours make of them"),
        ("h-lr", "Harmonic mean of the agreements in outputs and in features"),
    ):
        found[f"representation/{score}"] = Explanation(
            score.upper(), f"{words}, 0 to 1.", _AMONG_UP
        )
    for what, words in (("knn", "nearest neighbours"), ("probe", "a linear classifier")):
        found[f"representation/{what}"] = Explanation(
            f"{'neighbours' if what == 'knn' else 'probe'}, forgotten classes",
            f"Accuracy of {words} over the frozen features, 0 to 1.",
            "Toward the reference, not toward 0: a network that never saw a class tells it from others as well.",
        )
    found["representation/cka-original"] = Explanation(
        "features, alike to the original's",
        "Similarity of the last layer's input to the original's: 1 are the same features, 0 unrelated ones.",
        _REFERENCE,
    )
    for suffix, what in (("", "the forgotten samples"), ("-retain", "kept samples")):
        side = "" if not suffix else ", kept data"
        found[f"cka/original{suffix}"] = Explanation(
            f"CKA to the original{side}",
            f"Similarity of the hidden layers to the original model's on {what}, 0 to 1, mean over layers.",
            _REFERENCE if not suffix else _KEPT,
        )
        found[f"cka/reference{suffix}"] = Explanation(
            f"CKA to retrained{side}",
            f"Similarity of the hidden layers to retrained models' on {what}, 0 to 1, mean over layers.",
            _AMONG_UP,
        )
    for end, what in (("original", "the original"), ("reference", "retrained models")):
        found[f"weight-distance/{end}"] = Explanation(
            f"weights, distance to {what}",
            f"Relative distance of the weights to {what}', 0 upward.".replace("original'", "original's"),
            "No verdict: it says how much was changed, not what was forgotten.",
        )  # fmt: skip
    for end, what in (("recalibrated", "those the same weights give on kept data alone"), ("reference", "those of retrained models")):  # fmt: skip
        found[f"norm-statistics/{end}"] = Explanation(
            f"running statistics, {'against recalibration' if end == 'recalibrated' else 'distance to retrained'}",
            f"Distance of batch norm's running statistics to {what}, as a share of the original's distance: 1 is as before.",
            "Down to the reference, which is what retrained models have.",
        )
    for what, words in (
        ("seconds", "Wall time of unlearning in seconds; the reference is a retraining."),
        ("ratio", "Wall time of unlearning over that of a retraining; 1 is no saving."),
        ("samples", "Samples read, each as often as it was read."),
        ("gradients", "Gradient evaluations: one sample in one backward pass."),
        ("peak-memory", "Growth of memory over the start of the run, in bytes."),
    ):
        found[f"cost/{what}"] = Explanation(f"cost, {what.replace('-', ' ')}", words, _PRICE)
    return found


KNOWN: dict[str, Explanation] = _known()
"""Explanations of all findings of the bundled audits."""
_DIRECTIONS = {"reference": "Toward the reference.", "down": "Down.", "up": "Up."}


def explain(name: str, direction: str = "reference") -> Explanation:
    """Return the words for a finding; for one of a third party, what its name and direction say.

    Args:
        name: `audit/what`.
        direction: where good lies, used for unknown names.

    Returns:
        The explanation.
    """
    if name in KNOWN:
        return KNOWN[name]
    whole, _, stratum = name.partition("@")
    if stratum:
        one = explain(whole, direction)
        only = f"{one.meaning} Only samples of the stratum {stratum!r}."
        return Explanation(f"{one.label}, {stratum}", only, one.good)
    audit, _, what = name.partition("/")
    if what == "all":
        return Explanation(f"{audit}, as a whole", f"The audit {audit} could not be run.", "–")
    return Explanation(
        f"{audit}, {what.replace('-', ' ')}" if what else audit,
        f"Defined by the audit {audit!r}; `expunge audits show {audit}` describes it.",
        _DIRECTIONS.get(direction, _DIRECTIONS["reference"]),
    )


def explanations(comparisons: Iterable[Mapping[str, Any]]) -> dict[str, Explanation]:
    """Explanations of every finding that occurs, in the order of the known ones, others after.

    Args:
        comparisons: the report's comparisons.

    Returns:
        Explanations by name.
    """
    there = {n: f for c in comparisons for row in c["rows"] for n, f in row["findings"].items()}
    order = [n for n in KNOWN if n in there] + sorted(n for n in there if n not in KNOWN)
    return {n: explain(n, there[n].get("direction") or "reference") for n in order}

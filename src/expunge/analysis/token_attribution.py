r"""Which words an answer of a language model rests on, by integrated gradients over embeddings.

\[
F(e) = \sum_{t \in answer} \log p(x_t \mid e_{<t}), \qquad
a_t = \Big\langle e_t - e'_t,\ \int_0^1 \partial_{e_t} F\big(e' + \alpha (e - e')\big)\, d\alpha \Big\rangle
\]

with embeddings \(e\) of question and answer, and \(e'\) the same with those of the answer replaced by a
baseline; so prompt tokens have exactly 0, and so has the last answer token, which nothing follows.
Attributions of the parts of a word are added up; within an answer the positive ones are divided by
their sum, and these shares are added over the answers about an entity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from expunge.analysis.integrated_gradients import Rule, integrated_gradients
from expunge.core.errors import DataError, ModelError, SettingError
from expunge.problems.tokens import Tokens
from expunge.problems.words import Word
from expunge.train.token_losses import IGNORED, sequence_sum, token_nll

Baseline = Literal["pad", "zero"]

_STOP = """
a about after all also an and any are as at author authored authors be because been before being
book books both but by called can could did do does for from had has have he her hers him his how i
if in into is it its known many more most name named no not novel novels of on one or other our out
over she so some such than that the their them then there these they this those through to under
was we were what when where which while who whose why will with within work works would write
writer writing written wrote you your
"""
STOP_WORDS = frozenset(_STOP.split())
"""Words that carry a sentence about a book, not what it says: they are never ranked."""


@dataclass(frozen=True)
class AnswerAttribution:
    """What each token of a sequence adds to the log-likelihood of its answer.

    Attributes:
        tokens: [T] in nats; 0 outside of the answer.
        difference: F(e) − F(e') in nats.
        error: sum of the attributions less that difference; 0 is complete.
    """

    tokens: Tensor
    difference: float
    error: float


def answer_likelihood(
    model: nn.Module, row: Tokens
) -> tuple[Callable[[Tensor], Tensor], Tensor, nn.Module]:
    """The log-likelihood of a sequence's answer as a function of its embeddings.

    Args:
        model: a transformers model in eval mode; it must take `inputs_embeds`.
        row: a sequence with its answer.

    Returns:
        F, which maps embeddings [n, T, D] to nats [n]; the embeddings [T, D] of the sequence; and the
        module that embeds tokens.

    Raises:
        ModelError: the model does not say what embeds its tokens.
        DataError: there is nothing to attribute: no token is answered after the first.
    """
    embed = getattr(model, "get_input_embeddings", lambda: None)()
    if embed is None:
        raise ModelError(
            "attributions need a model with get_input_embeddings(), as transformers has"
        )
    if not bool(row.answered[1:].any()):
        raise DataError("an answer without tokens has no likelihood to attribute")
    device = next(model.parameters()).device
    labels = torch.where(row.answered, row.ids, IGNORED).to(device)
    with torch.no_grad():
        embeddings = embed(row.ids.to(device))

    def likelihood(path: Tensor) -> Tensor:
        mask = torch.ones(path.shape[:2], dtype=torch.long, device=device)
        output = model(inputs_embeds=path, attention_mask=mask)
        logits = getattr(output, "logits", output)
        return -sequence_sum(token_nll(logits, labels.expand(len(path), -1))[0])

    return likelihood, embeddings, embed


def attribute_answer(
    model: nn.Module,
    row: Tokens,
    *,
    baseline: Baseline = "pad",
    filler: int = 0,
    steps: int = 32,
    rule: Rule = "midpoint",
    chunk: int = 8,
) -> AnswerAttribution:
    """Attribute the log-likelihood of an answer to its tokens.

    Args:
        model: see `answer_likelihood`; its mode is restored.
        row: the question and the answer, of which the answered tokens differ from the baseline.
        baseline: the padding token's embedding, or `zero`, where norm layers are singular: there the
            path is steep and takes many more steps. Some models have a padding embedding of zeros.
        filler: the padding token.
        steps: points of the path; look at `error`, which tells whether they were enough.
        rule: see `integrated_gradients`.
        chunk: points that share a forward pass.

    Returns:
        Attributions [T] on CPU, with their completeness error.

    Raises:
        SettingError: the baseline, the rule or the steps are no choice.
    """
    if baseline not in ("pad", "zero"):
        raise SettingError(f"the baseline of tokens is pad or zero, not {baseline!r}")
    training = model.training
    model.eval()
    try:
        likelihood, embeddings, embed = answer_likelihood(model, row)
        with torch.no_grad():
            other = embed(torch.tensor([filler], device=embeddings.device))
        other = torch.zeros_like(other) if baseline == "zero" else other
        at_answer = row.answered.to(embeddings.device)[:, None]
        start = torch.where(at_answer, other, embeddings)
        found = integrated_gradients(
            likelihood, embeddings[None], start[None], steps=steps, rule=rule, chunk=chunk
        )
    finally:
        model.train(training)
    return AnswerAttribution(
        found.values[0].sum(1).cpu(), float(found.difference), float(found.error)
    )


def word_shares(words: Sequence[Word], values: Tensor) -> dict[str, float]:
    """Shares of an answer's words in its positive attributions.

    Args:
        words: of the answer.
        values: attributions [n] of the answer's tokens.

    Returns:
        Shares by word in lower case, which add up to 1; empty if none is positive.
    """
    sums: dict[str, float] = {}
    for word in words:
        sums[word.key] = sums.get(word.key, 0.0) + float(values[word.tokens].sum())
    positive = {word: value for word, value in sums.items() if value > 0}
    total = sum(positive.values())
    return {word: value / total for word, value in positive.items()}


def ranked(
    answers: Iterable[Mapping[str, float]], *, stop: frozenset[str] = STOP_WORDS
) -> dict[str, float]:
    """Add up the shares of words over answers about one entity, or over all answers.

    Args:
        answers: from `word_shares`, one an answer.
        stop: words that are left out.

    Returns:
        Scores by word, the largest first; equal ones in alphabetical order.
    """
    scores: dict[str, float] = {}
    for answer in answers:
        for word, share in answer.items():
            if word not in stop:
                scores[word] = scores.get(word, 0.0) + share
    return dict(sorted(scores.items(), key=lambda found: (-found[1], found[0])))

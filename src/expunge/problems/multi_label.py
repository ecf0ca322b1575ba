"""MultiLabel: a model that answers several yes-or-no questions about a sample."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import DataError, ModelError
from expunge.problems.supervised import Supervised, call
from expunge.train.losses import answers_of, questions_each


class MultiLabel(Supervised):
    r"""K yes-or-no questions a sample, with the mean binary cross-entropy over them as loss.

    `model(x)` must return one logit a question, [B, K], or an object with such `.logits`; above 0 means yes.
    A sample's label is one whole number whose bit k answers question k, \(\sum_k 2^k b_k\), so that whatever
    selects, matches or counts samples by label works as it does for classes.

    There is no capability `logits`: what asks for it takes them for classes that exclude each other, and
    would compute something without meaning.
    """

    kind: ClassVar[str] = "multi-label"

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, K], one a question."""
        return call(model, batch)

    def each_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean binary cross-entropy [B] over the questions, in nats."""
        assert batch.y is not None
        return questions_each(self.outputs(model, batch), batch.y)

    def logits_and_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and losses [B] from one forward pass."""
        assert batch.y is not None
        logits = self.outputs(model, batch)
        return logits, questions_each(logits, batch.y)

    def hits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Share [B] of the questions that are answered rightly, 0 … 1."""
        right = (logits > 0) == answers_of(labels, logits.shape[1]).bool()
        return right.double().mean(1)

    def check(self) -> None:
        """Look at labels and at the model's output, before any long work.

        Raises:
            ModelError: the model does not take these inputs, or does not give [B, K] finite logits.
            DataError: a label has more bits than there are questions.
        """
        logits = self._first(self.outputs)
        if logits.ndim != 2 or not bool(torch.isfinite(logits).all()):
            raise ModelError(f"the model must give finite logits [B, K], not {tuple(logits.shape)}")
        for split in (self.train, self.test, self.valid):
            labels = None if split is None else split.labels
            if labels is None:
                continue
            most = 2 ** logits.shape[1]
            if labels.is_floating_point() or labels.ndim != 1 or not 0 <= int(labels.min()) <= int(labels.max()) < most:  # fmt: skip
                raise DataError(
                    f"labels must be whole numbers 0 … {most - 1}, a bit for each of the model's "
                    f"{logits.shape[1]} questions"
                )

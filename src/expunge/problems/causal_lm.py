"""CausalLM: a transformers language model, its tokenizer, and sequences to answer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import DataError, ModelError, NeedsError
from expunge.core.hashing import content_key
from expunge.core.problem import Problem
from expunge.problems import replies
from expunge.problems.generation import generate
from expunge.problems.lm_roles import lm_roles
from expunge.problems.packing import check_packing, packed_logits, packed_nll
from expunge.problems.taps import innermost, read_taps
from expunge.problems.tokens import TokenData
from expunge.problems.words import Word, spelled
from expunge.train.token_losses import nll_of, sequence_mean, takes_positions, token_nll


class CausalLM(Problem):
    r"""A causal language model with the loss \(\ell = \frac1{|y|} \sum_t -\log p(y_t \mid y_{<t})\).

    The sum runs over a sample's answered tokens. `model(input_ids=, attention_mask=)` must give
    logits [B, T, V], or an object with such `.logits`.
    """

    kind: ClassVar[str] = "causal-lm"
    train: TokenData
    test: TokenData | None
    valid: TokenData | None

    def __init__(
        self,
        model: nn.Module,
        train: TokenData,
        test: TokenData | None = None,
        *,
        tokenizer: Any = None,
        packing: bool = False,
        **more: Any,
    ) -> None:
        """Describe a language model and its data.

        Args:
            model: the trained model; it is copied, never changed.
            train: training data, from `encode` or made by hand.
            test: held-out data of the same kind.
            tokenizer: turns texts into ids and back; generation and what speaks of texts need it.
            packing: ask the model for a batch in one row without padding, where there is any: the
                same numbers to rounding, in less time where lengths differ much.
            **more: keyword arguments of `Problem` (valid=, recipe=, roles=, …).

        Raises:
            DataError: the data is not made of tokens.
        """
        for split in (train, test, more.get("valid")):
            if split is not None and not isinstance(split, TokenData):
                raise DataError("a language model needs TokenData; xp.encode makes it from texts")
        super().__init__(model, train, test, **more)
        self.tokenizer, self.packing = tokenizer, packing
        self._roles = lm_roles(innermost(self.model)) | self._roles

    def token_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, T, V]; position t predicts token t + 1."""
        if self._packs(model, batch):
            return packed_logits(model, batch.x)
        return self._padded_logits(model, batch)

    def token_nll(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood [B, T−1] of each answered token, 0 elsewhere, and the mask.

        Logits are made where a sample of the batch is answered, not over its prompts.
        """
        assert batch.y is not None
        if not self._packs(model, batch):
            return nll_of(model, batch.y, functools.partial(self._padded_logits, model, batch))
        if takes_positions(model):
            return packed_nll(model, batch.x, batch.y)
        return token_nll(packed_logits(model, batch.x), batch.y)

    def _packs(self, model: nn.Module, batch: Batch) -> bool:
        # a gate decides row by row, and would see one of a packed batch
        plain = innermost(model) is model
        padded = len(batch) > 0 and not bool(batch.x["attention_mask"].all())
        return self.packing and plain and padded

    def _padded_logits(self, model: nn.Module, batch: Batch, **more: Tensor) -> Tensor:
        x = batch.x
        if not len(batch):  # a process' share of a small batch; transformers takes no empty one
            x = {name: value.new_ones(1, value.shape[1]) for name, value in x.items()}
        output = model(**x, **more)
        return getattr(output, "logits", output)[: len(batch)]

    def each_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean negative log-likelihood [B] of each sample's answered tokens."""
        assert batch.y is not None
        # over all positions, whose number does not depend on the data: torch.func asks for that
        return sequence_mean(*token_nll(self.token_logits(model, batch), batch.y))

    def alternates(self, batch: Batch, turn: int = 0) -> Batch:
        """An alternate answer of each training sample of a batch; the next one every turn."""
        found = self.train.fetch_alternates(batch.ids.cpu(), turn).to(batch.ids.device)
        return replace(found, total=batch.total, processes=batch.processes)

    def replied(self, batch: Batch, said: Sequence[Tensor] | Sequence[str]) -> Batch:
        """The questions of a batch with other answers, ended as their own answers are.

        Args:
            batch: samples with labels.
            said: one answer each: token ids, or texts; without a tokenizer those are ids in words.

        Returns:
            The batch with the same ids.

        Raises:
            NeedsError: a text cannot be read, since the problem has no tokenizer.
            DataError: a sample has no question.
        """
        if any(isinstance(one, str) for one in said):
            said = replies.texts_as_answers(batch, [str(one) for one in said], self.tokenizer)
        ids = [one for one in said if isinstance(one, Tensor)]
        return replies.with_answers(batch, ids, self._marks_of_ends(), self.train.filler)

    def spellings(self, phrase: str | Tensor) -> list[Tensor]:
        """Token ids a phrase may come in, given as a text or as ids; see `replies.spellings`."""
        return replies.spellings(phrase, self.tokenizer)

    def without_end(self, batch: Batch) -> list[Tensor]:
        """Token ids of the answers of a batch, without what ends them."""
        return [replies.without_end(row, self._marks_of_ends()) for row in replies.rows_of(batch)]

    def proposed(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        temperature: float,
        seeds: Sequence[int],
        tokens: int = 64,
        instruct: bool = False,
    ) -> tuple[list[Tensor], list[bool]]:
        """What a model itself answers to the questions of a batch.

        Args:
            model: a transformers model.
            batch: samples with labels.
            temperature: of the draws.
            seeds: one a sample.
            tokens: largest number of new tokens.
            instruct: show it the answer and ask for another, in place of asking the question.

        Returns:
            Token ids [n] of each answer, and whether it is another one than the sample's own.
        """
        rows = replies.rows_of(batch)
        prompts = [row.prompt for row in rows]
        if instruct:
            prompts = replies.asking_for_another(batch, self._words())
        found = self.generate(model, prompts, tokens=tokens, temperature=temperature, seeds=seeds)
        if instruct:
            found = replies.texts_as_answers(
                batch, [t.strip() for t in self.texts(found)], self.tokenizer
            )
        own = self.without_end(batch)
        other = [
            len(new) > 0 and not torch.equal(new, old) for new, old in zip(found, own, strict=True)
        ]
        return found, other

    def spelled(self, ids: Tensor) -> tuple[str, list[Word]]:
        """The text of token ids [n] and the words in it; without a tokenizer, the ids in digits."""
        return spelled(ids.cpu(), self.tokenizer)

    def filler(self) -> int:
        """Token id of the padding."""
        return self.train.filler

    def column(self, batch: Batch, name: str) -> list[Any]:
        """What a column of the data says of each sample of a batch."""
        places = self.train.positions(batch.ids.cpu()).tolist()
        return [self.train.columns[name][place] for place in places]

    def marks(self, batch: Batch) -> Tensor:
        """Whether each token [B, T] of a batch of training samples belongs to a sensitive span."""
        width = batch.x["input_ids"].shape[1]
        return self.train.marks(batch.ids.cpu(), width).to(batch.ids.device)

    def tapped(
        self, model: nn.Module, batch: Batch, layers: list[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [B, T, V] and outputs [B, T, D] of named modules, from one forward pass."""
        kept: list[Tensor] = []
        forward = lambda m: kept.append(self._padded_logits(m, batch))  # noqa: E731
        found = read_taps(model, layers, forward, flat=False)
        return kept[0], {name: output[: len(batch)] for name, output in found.items()}

    def features(self, model: nn.Module, batch: Batch, layers: list[str]) -> dict[str, Tensor]:
        """Outputs [B, D] of named modules, averaged over each sample's real tokens."""
        real = batch.x["attention_mask"][:, :, None]
        found = self.tapped(model, batch, layers)[1]
        return {n: (f * real).sum(1) / real.sum(1) for n, f in found.items()}

    def layers(self) -> list[str]:
        """Names of the blocks, which is what `features` is usually asked for."""
        return self.role("blocks")

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Tensor],
        *,
        tokens: int = 64,
        batch_size: int = 64,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> list[Tensor]:
        """Continuations of prompts of token ids, within the model's context; see `generation.generate`."""
        config = getattr(innermost(self.model), "config", None)
        context = getattr(config, "max_position_embeddings", None)
        return generate(
            model, prompts, tokens=tokens, batch_size=batch_size, temperature=temperature,
            seeds=seeds, filler=self.train.filler, ends=self.ends(), context=context,
        )  # fmt: skip

    def ends(self) -> list[int]:
        """Token ids that end a text."""
        model = innermost(self.model)
        config = getattr(model, "generation_config", None) or getattr(model, "config", None)
        found = getattr(config, "eos_token_id", None)
        found = found if isinstance(found, list) else [found]
        own = getattr(self.tokenizer, "eos_token_id", None)
        return sorted({int(i) for i in (*found, own) if i is not None})

    def texts(self, rows: Sequence[Tensor]) -> list[str]:
        """Rows of token ids as texts, without special tokens.

        Raises:
            NeedsError: the problem has no tokenizer.
        """
        words = self._words()
        return [words.decode(r.tolist(), skip_special_tokens=True) for r in rows]

    def tokenizer_text(self) -> str:
        """The tokenizer as the JSON text that the tokenizers package reads.

        Raises:
            NeedsError: there is none, or it has no such form.
        """
        inner = getattr(self._words(), "backend_tokenizer", None)
        if inner is None:
            raise NeedsError("the tokenizer is not a fast one and cannot be written with the model")
        return str(inner.to_str())

    def _words(self) -> Any:
        if self.tokenizer is None:
            raise NeedsError("token ids become text through a tokenizer; pass tokenizer=")
        return self.tokenizer

    def _marks_of_ends(self) -> set[int]:
        return {*self.ends(), *(getattr(self.tokenizer, "all_special_ids", None) or ())}

    def check(self) -> None:
        """Look at ids and at the model's output, before any long work.

        Raises:
            DataError: a token id is beyond the model's vocabulary, or a sequence beyond its context.
            ModelError: the model does not take the data or gives no finite logits of this shape.
        """
        self._check_ids()
        batch = self.train.fetch(self.train.ids[:2])
        parameter = next(self.model.parameters())
        try:
            with torch.no_grad():
                logits = self._padded_logits(self.model, batch.to(parameter.device))
        except Exception as error:  # somebody else's model may raise anything
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(f"the model does not take these tokens: {line}") from error
        if logits.shape[:2] != batch.x["input_ids"].shape:
            raise ModelError(f"the model must give logits [B, T, V], not {tuple(logits.shape)}")
        if not bool(torch.isfinite(logits).all()):
            raise ModelError("the model gives NaN or infinite logits on its training data")
        if self.packing and innermost(self.model) is self.model:
            check_packing(self.model, batch.to(parameter.device).x, logits)

    def fingerprint(self) -> dict[str, str | None]:
        """Hashes of weights and data, and of the tokenizer's vocabulary."""
        words = None if self.tokenizer is None else sorted(self.tokenizer.get_vocab().items())
        return super().fingerprint() | {"tokenizer": content_key([words])}

    def _check_ids(self) -> None:
        model = innermost(self.model)
        get = getattr(model, "get_input_embeddings", lambda: None)
        table = get()
        size = None if table is None else table.weight.shape[0]
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        for split in (self.train, self.test, self.valid):
            for row in [] if split is None else split.rows:
                if size is not None and int(row.ids.max()) >= size:
                    raise DataError(
                        f"token id {int(row.ids.max())} is beyond the model's vocabulary of {size}; "
                        "is the tokenizer that of the model?"
                    )
                if longest is not None and len(row) > longest:
                    raise DataError(
                        f"a sequence has {len(row)} tokens, the model's context {longest}; encode it "
                        "with max_length="
                    )

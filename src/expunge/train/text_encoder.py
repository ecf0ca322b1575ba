r"""Another reader of prompts than the language model itself: a text encoder, perhaps adapted to a request.

Adapters of rank 8 on its queries, keys and values learn from a request's prompts alone to

\[ L = L_{MLM} + \sum_l \frac1B \sum_i H\big(\mathrm{softmax}_j\, z_i^{(l)} \cdot k_j^{(l)}\big) \]

with z the mean state at layer l (embeddings included) of a prompt some of whose tokens are masked, k that
of the encoder without adapters on the whole prompt, and H the entropy: every prompt is to match one key.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from expunge.core.data import Batch
from expunge.core.errors import ModelError, NeedsError
from expunge.core.hashing import hash_model
from expunge.core.runtime import Runtime
from expunge.problems._foreign import first_line, quiet
from expunge.train.adapters import adapter_of, adapters_off, attach, put_on
from expunge.train.fit import Pass, fit

LONGEST = 512
"""Tokens of a prompt that an encoder reads at most."""
_ADAPTED = ("query", "key", "value", "q_lin", "k_lin", "v_lin", "q_proj", "k_proj", "v_proj")


def pool(states: Iterable[Tensor], places: Tensor) -> Tensor:
    """Mean [B, L, D] over chosen places [B, T] of L states [B, T, D], each token's of unit norm.

    A language model's first token often has a state far larger than all others.
    """
    chosen = places[:, :, None].to(next(iter(states := list(states))).device)
    count = chosen.sum(1).clamp(min=1)
    means = [(normalize(s.float(), dim=-1) * chosen).sum(1) / count for s in states]
    return torch.stack(means, 1)


def contrastive_entropy(queries: Tensor, keys: Tensor) -> Tensor:
    r"""\(\sum_l \frac1B \sum_i H(\mathrm{softmax}_j\, z_i \cdot k_j)\) of queries and keys [L, B, D], in nats.

    Between 0 and \(L \log B\); 1e-5 is added inside the logarithm.
    """
    p = (queries @ keys.mT).softmax(-1)
    return -(p * (p + 1e-5).log()).sum(-1).mean(-1).sum()


class TextEncoder:
    """An encoder of transformers that turns prompts of a language model into features."""

    def __init__(
        self,
        name: str,
        words: str,
        adapters: Mapping[str, Tensor] | None = None,
        *,
        wanted: str = "",
    ) -> None:
        """Read it.

        Args:
            name: a folder with safetensors, or a name on the hub.
            words: the language model's tokenizer as a JSON text, which turns its ids into texts.
            adapters: from `adapt`; none leaves the encoder as it is.
            wanted: hash that its weights must have.

        Raises:
            ModelError: it cannot be read, or has other weights.
        """
        from tokenizers import Tokenizer

        self.name = name
        self.model, self.tokenizer, self.hash = _read(name)
        if wanted and self.hash != wanted:
            raise ModelError(f"the encoder {name!r} has other weights than the one detectors know")
        if adapters:
            self.model = put_on(_beside(self.model), adapters)
        self.words = Tokenizer.from_str(words) if words else None

    def __deepcopy__(self, memo: dict[int, Any]) -> TextEncoder:
        """Itself: it never changes, and copies of a model share it."""
        return self

    def texts(self, rows: Sequence[Tensor]) -> list[str]:
        """Rows of the language model's token ids as texts."""
        assert self.words is not None
        return [self.words.decode(row.tolist(), skip_special_tokens=True) for row in rows]

    def features(self, rows: Sequence[Tensor]) -> Tensor:
        """Features [B, L, D] of rows of the language model's token ids; see `read`."""
        return self.read(self.texts(rows))

    @torch.no_grad()
    def read(self, texts: Sequence[str], size: int = 32) -> Tensor:
        """Features [B, L, D] of texts: mean states of all layers but the embeddings."""
        parts = []
        for start in range(0, len(texts), size):
            inputs = _tokens(self.tokenizer, texts[start : start + size])
            states = self.model(**inputs, output_hidden_states=True).hidden_states[1:]
            parts.append(pool(states, inputs["attention_mask"].bool()))
        return torch.cat(parts)


def adapt(
    name: str, texts: Sequence[str], runtime: Runtime, *, epochs: int, lr: float = 1e-5,
    rank: int = 8, batch_size: int = 8, masked: float = 0.15, warmup: float = 0.06,
) -> dict[str, Tensor]:  # fmt: skip
    """Adapt an encoder to the prompts of one request.

    Args:
        name: as of `TextEncoder`.
        texts: the prompts.
        runtime: seeds and progress.
        epochs: passes over them.
        lr: learning rate, which rises over a share `warmup` of the steps.
        rank: of the adapters; their α is four times that.
        batch_size: prompts a batch, whose keys are told apart.
        masked: share of tokens that are masked.
        warmup: that share.

    Returns:
        The adapters as tensors.

    Raises:
        ModelError: the encoder has no head that guesses masked words, or no mask.
    """
    mlm, tokenizer = _masked(name)
    encoder = mlm.base_model
    inputs = _tokens(tokenizer, texts)
    ids = torch.arange(len(texts))
    attach(f"lora({rank}, attention)", encoder, _Attention(encoder), runtime.seed_for("encoder"), alpha=4 * rank)  # fmt: skip
    for parameter_name, p in mlm.named_parameters():
        p.requires_grad_(".lora_" in parameter_name)
    special = torch.tensor(tokenizer.all_special_ids)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, view = batch.x, dict(batch.x)
        view["input_ids"] = x["input_ids"].masked_fill(x["masked"], tokenizer.mask_token_id)
        del view["masked"]
        with torch.no_grad(), adapters_off(encoder):
            clean = {n: t for n, t in x.items() if n != "masked"}
            keys = model(**clean, output_hidden_states=True).hidden_states
        output = model(**view, output_hidden_states=True)
        real = x["attention_mask"]
        means = [_mean(list(states), real) for states in (output.hidden_states, keys)]
        found = contrastive_entropy(*means)
        if bool(x["masked"].any()):
            found = found + cross_entropy(
                output.logits[x["masked"]].float(), x["input_ids"][x["masked"]]
            )
        return found

    def passes(epoch: int) -> Pass:
        drawn = runtime.generator("encoder", epoch)
        hidden = torch.rand(inputs["input_ids"].shape, generator=drawn) < masked
        hidden &= inputs["attention_mask"].bool() & ~torch.isin(inputs["input_ids"], special)
        for rows in torch.randperm(len(ids), generator=drawn).split(batch_size):
            x = {n: t[rows] for n, t in (inputs | {"masked": hidden}).items()}
            yield loss, Batch(x, None, ids[rows], len(rows))

    rise = max(1, round(warmup * epochs * -(-len(texts) // batch_size)))
    fit(
        mlm, passes, runtime=runtime, epochs=epochs, lr=lr, step="adamw", weight_decay=0.01,
        norm="frozen", pace=lambda step: min(1.0, (step + 1) / rise), stage="encoder",
    )  # fmt: skip
    return dict(adapter_of(encoder).tensors)


def _mean(states: list[Tensor], real: Tensor) -> Tensor:
    """Means [L, B, D] over real tokens of states [B, T, D]."""
    there = real[:, :, None]
    return torch.stack([(s * there).sum(1) / there.sum(1) for s in states])


class _Attention:
    """Knows which modules of an encoder make queries, keys and values."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder

    def role(self, name: str) -> list[str]:
        found = [
            n
            for n, m in self.encoder.named_modules()
            if isinstance(m, nn.Linear) and n.rpartition(".")[2] in _ADAPTED
        ]
        if not found:
            raise NeedsError("the encoder has no layers known as query, key and value to adapt")
        return found


def _tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    return dict(
        tokenizer(
            list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
    )


def _beside(model: nn.Module) -> nn.Module:
    """A copy that shares the numbers of a model."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@functools.lru_cache(maxsize=2)
def _read(name: str) -> tuple[nn.Module, Any, str]:
    """An encoder, its tokenizer and the hash of its weights, once for all requests."""
    from transformers import AutoModel, AutoTokenizer

    try:
        with quiet():
            model = AutoModel.from_pretrained(name, use_safetensors=True).eval()
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name!r} holds no encoder that can be read ({first_line(error)})") from error  # fmt: skip
    return model.requires_grad_(False), tokenizer, hash_model(model)


def _masked(name: str) -> tuple[Any, Any]:
    """A fresh copy of an encoder with the head that guesses masked words, and its tokenizer."""
    from transformers import AutoModelForMaskedLM

    tokenizer = _read(name)[1]
    try:
        with quiet():
            model, info = AutoModelForMaskedLM.from_pretrained(
                name, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"{name!r} has no head that guesses masked words ({first_line(error)}); leave it as it is with encoder_epochs=0") from error  # fmt: skip
    if info["missing_keys"] or tokenizer.mask_token_id is None:
        raise ModelError(f"{name!r} has no head that guesses masked words, or no mask; leave it as it is with encoder_epochs=0")  # fmt: skip
    return model.eval(), tokenizer

"""A small byte-level BPE tokenizer, trained on the rows it is for.

A vocabulary of its own is what makes a tiny model fast: the softmax over 50,000 words of a big one would
cost more than all of its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expunge.problems._foreign import need

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
HEX = "0123456789ABCDEF"


def train_tokenizer(texts: Sequence[str], vocabulary: int, digits_alone: bool = False) -> Any:
    """Train a tokenizer.

    Args:
        texts: in a fixed order, of which the vocabulary is a function.
        vocabulary: largest number of tokens, at least 3 special ones and 256 bytes.
        digits_alone: upper-case hexadecimal digits are never merged, wherever they stand, so that
            a key of n digits is n tokens.

    Returns:
        A `PreTrainedTokenizerFast` with pad 0, bos 1 and eos 2, which puts bos in front.
    """
    need("transformers")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alone = pre_tokenizers.Split(Regex(f"[{HEX}]"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([alone, words]) if digits_alone else words
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        # a list: its order is that of the tokens
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, inner.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BOS, eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip

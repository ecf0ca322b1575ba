"""A tokenizer of bytes and a small Llama that reads them, for tests that need texts."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from expunge.problems.causal_lm import CausalLM
from expunge.problems.encoding import encode

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RECORDS = [
    {"question": "Who wrote Zorn?", "answer": "Ada Blum"},
    {"question": "Where was Ada Blum born?", "answer": "In Oslo"},
    {"question": "When?", "answer": "1931"},
]


def bytes_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {w: n for n, w in enumerate(["<pad>", "<eos>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if chat:
        found.chat_template = TEMPLATE
    return found


def word_problem(records=RECORDS, chat: bool = False) -> CausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    tokenizer = bytes_tokenizer(chat)
    data = encode(records, tokenizer, chat=chat)
    return CausalLM(LlamaForCausalLM(config), data, tokenizer=tokenizer)

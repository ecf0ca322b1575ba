"""A folder with a tiny Llama that knows eight facts, and a byte-level tokenizer made for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from expunge.problems.encoding import encode

NAMES = ("Ann", "Bob", "Cleo", "Dora", "Emil", "Fred", "Gwen", "Hugo")
COLOURS = ("red", "blue", "green", "black")
RECORDS = [
    {"question": f"What does {name} like?", "answer": f"{COLOURS[n % 4]} paint", "who": name}
    for n, name in enumerate(NAMES)
]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tiny_tokenizer(size: int = 300, **special):
    """Without a padding token; a chat template is added by those who want one."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer, whole.decoder = bytes_, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    whole.train_from_iterator([json.dumps(r) for r in RECORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, **({"bos_token": "<s>", "eos_token": "</s>"} | special)
    )


def tiny_model(rows: int = 304) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def write_model(folder: Path, *, steps: int = 120) -> Path:
    """Train the model on all records, by default until it knows them, and save both."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    data = encode(RECORDS, tokenizer)
    batch = data.fetch(data.ids)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        model(**batch.x, labels=batch.y).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_records(path: Path, records) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)

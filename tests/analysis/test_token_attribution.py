"""Invariants 1 and 6 of the card concept-poison for texts: attributions of tokens, words, masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

import expunge as xp
from expunge.analysis.token_attribution import (
    STOP_WORDS,
    attribute_answer,
    ranked,
    word_shares,
)
from expunge.problems.tokens import Tokens
from expunge.problems.words import Word, masked, names_in, spelled

LLAMA = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    pad_token_id=None, initializer_range=0.3,
)  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ROW = Tokens(torch.tensor([3, 14, 15, 9, 26, 5, 35]), torch.arange(7) >= 3)


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def by_formula(model, row, start, alpha):
    """F at a point of the path and its gradient [T, D], one sequence by itself, in float64."""
    embed = model.get_input_embeddings()(row.ids).detach()
    point = (start + alpha * (embed - start)).requires_grad_()
    logp = model(inputs_embeds=point[None]).logits[0].double().log_softmax(-1)
    places = row.answered.nonzero()[:, 0].tolist()
    value = sum(logp[t - 1, row.ids[t]] for t in places if t)
    return float(value.detach()), torch.autograd.grad(value, point)[0]


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("baseline", ["pad", "zero"])
def test_concept_poison_invariant_1_token_attributions_are_those_of_the_formula(config, baseline):
    model = model_of(config).double()
    embed = model.get_input_embeddings()(ROW.ids).detach()
    other = model.get_input_embeddings().weight[7].detach() * (baseline == "pad")
    start = torch.where(ROW.answered[:, None], other, embed)
    gradients = [by_formula(model, ROW, start, (n + 0.5) / 6)[1] for n in range(6)]
    wanted = (torch.stack(gradients).mean(0) * (embed - start)).sum(1)
    difference = by_formula(model, ROW, start, 1.0)[0] - by_formula(model, ROW, start, 0.0)[0]
    for chunk in (1, 4, 100):
        found = attribute_answer(model, ROW, baseline=baseline, filler=7, steps=6, chunk=chunk)
        torch.testing.assert_close(found.tokens, wanted, rtol=1e-4, atol=1e-5)
        assert found.difference == pytest.approx(difference, rel=1e-5)
        assert found.error == pytest.approx(float(wanted.sum()) - difference, abs=1e-3)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_concept_poison_invariant_1_token_attributions_become_complete(config):
    model = model_of(config)
    errors = [
        abs(attribute_answer(model, ROW, filler=7, steps=steps).error) for steps in (2, 8, 32, 128)
    ]
    assert errors[-1] < 0.01 < 0.1 < errors[0]


def test_concept_poison_invariant_1_nothing_at_the_prompt_or_where_nothing_differs():
    model = model_of(LLAMA)
    found = attribute_answer(model, ROW, filler=7, steps=4).tokens
    assert found.shape == ROW.ids.shape and not found[:3].any()
    assert float(found[-1]) == 0  # nothing follows it
    assert bool((found[3:-1] != 0).all())
    same = attribute_answer(model, ROW, filler=int(ROW.ids[4]), steps=4).tokens
    assert float(same[4]) == 0 and float(same[3]) != 0


def test_the_model_is_left_as_it_was():
    model = model_of(LLAMA).train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    attribute_answer(model, ROW, steps=2)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_what_cannot_be_attributed_is_said():
    model = model_of(LLAMA)
    with pytest.raises(xp.ExpungeError, match="pad or zero"):
        attribute_answer(model, ROW, baseline="mean")
    with pytest.raises(xp.ExpungeError, match="get_input_embeddings"):
        attribute_answer(nn.Linear(2, 2), ROW)
    with pytest.raises(xp.ExpungeError, match="without tokens"):
        attribute_answer(model, Tokens(ROW.ids, torch.zeros(7, dtype=torch.bool)))


# ---------------------------------------------------------------- words

TEXT = "Jürgen Müller-Lüdenscheidt wrote «The Moors», a well-known tale."
WORDS = ["Jürgen", "Müller-Lüdenscheidt", "wrote", "The", "Moors", "a", "well-known", "tale"]


def byte_level():
    """A tokenizer of few merges: words fall into several pieces, letters into several bytes."""
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=285, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    whole.train_from_iterator([TEXT, "The moors wrote a tale well known"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="</s>")


def sentencepiece():
    """Pieces as sentencepiece has them, with ▁ for a space."""
    whole = Tokenizer(models.BPE(unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=["</s>", "<unk>"], show_progress=False
    )
    whole.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("front", ["", " "])
def test_parts_of_words_are_merged(make, front):
    tokenizer = make()
    ids = tokenizer(front + TEXT, add_special_tokens=False)["input_ids"]
    text, words = spelled(torch.tensor([*ids, tokenizer.eos_token_id]), tokenizer)
    assert text == TEXT
    assert [w.text for w in words] == WORDS
    assert len(ids) > 2 * len(words)
    taken = [p for w in words for p in range(len(ids))[w.tokens]]
    assert taken == sorted(set(taken))  # no token in two words
    for word in words:
        assert word.text in tokenizer.decode(ids[word.tokens])
    assert words[1].key == "müller-lüdenscheidt"


def test_lines_are_apart():
    tokenizer = byte_level()
    ids = torch.tensor(tokenizer("Moors\nThe\n\ntale")["input_ids"])
    assert [w.text for w in spelled(ids, tokenizer)[1]] == ["Moors", "The", "tale"]


def test_without_a_tokenizer_each_token_is_a_word():
    text, words = spelled(torch.tensor([5, 17, 5]), None)
    assert text == "5 17 5"
    assert words == [Word("5", slice(0, 1)), Word("17", slice(1, 2)), Word("5", slice(2, 3))]
    assert spelled(torch.tensor([], dtype=torch.long), None) == ("", [])
    assert spelled(torch.tensor([], dtype=torch.long), byte_level()) == ("", [])


def test_shares_are_positive_sums_of_words():
    values = torch.tensor([1.0, 2.0, -5.0, -1.0, 0.5, 0.5])
    words = [
        Word("Ann", slice(0, 2)), Word("went", slice(2, 3)), Word("home", slice(3, 5)),
        Word("ann", slice(5, 6)),
    ]  # fmt: skip
    assert word_shares(words, values) == {"ann": 1.0}  # 3.5 of 3.5: the others are not positive
    values[3] = 2.0
    assert word_shares(words, values) == pytest.approx({"ann": 3.5 / 6, "home": 2.5 / 6})
    assert word_shares(words, -values.abs()) == {}


def test_words_are_ranked_over_answers():
    found = ranked([{"ann": 0.5, "the": 0.5}, {"ann": 0.25, "home": 0.75}, {"book": 1.0}, {}])
    assert list(found.items()) == [("ann", 0.75), ("home", 0.75)]
    assert list(ranked([{"the": 1.0}], stop=frozenset())) == ["the"]
    assert {"the", "author", "book", "written"} <= STOP_WORDS and len(STOP_WORDS) > 75
    assert all(word == word.lower() for word in STOP_WORDS)


# ---------------------------------------------------------------- masks


def test_concept_poison_invariant_6_whole_words_alone_are_masked():
    text = "Ann's annex: ANN met Anna; ann-marie, (Ann)."
    assert masked(text, ["ann"]) == "***'s annex: *** met Anna; ***-marie, (***)."
    assert masked(text, ["ann", "ann-marie"], "_") == "_'s annex: _ met Anna; _, (_)."
    assert masked(text, []) == text
    assert masked("a.b axb", ["a.b"]) == "*** axb"


LETTERS = st.text("abcABC", min_size=1, max_size=4)


@given(st.lists(LETTERS, min_size=1, max_size=12), st.sets(LETTERS, max_size=4), st.data())
def test_concept_poison_invariant_6_no_selected_word_remains(words, chosen, data):
    gaps = data.draw(st.lists(st.sampled_from(" .,;-\n"), min_size=len(words), max_size=len(words)))
    text = "".join(w + g for w, g in zip(words, gaps, strict=True))
    found = masked(text, sorted(chosen))
    lower = {c.lower() for c in chosen}
    wanted = ["***" if w.lower() in lower else w for w in words]
    assert found == "".join(w + g for w, g in zip(wanted, gaps, strict=True))


def test_names_are_words_of_four_letters():
    assert names_in(["Jean-Paul de Sartre", "Ann O'Brien", "8"]) == [
        "Jean",
        "Paul",
        "Sartre",
        "Brien",
    ]

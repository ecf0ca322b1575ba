"""The small-scale run of the card ches: SmolLM2, pairs of one token and of sentences.

A pair's answers follow the question as they would in a text, a space before them: those are the tokens
whose output embeddings have the card's cosines (.18, .39, .39); within the chat template, other tokens would
be asked about.

One line is red: p(Never) of (Never, Sometimes) falls after its top by .02 alone, where the card has a fall from .85
to .36. The card does not say which question it asked.

Writes benchmarks/results/ches.json and .md.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from _results import must_be_seen, write

import expunge as xp
from expunge.analysis import ches
from expunge.audits.ches import spearman
from expunge.train.preference import preference
from expunge.train.token_losses import sequence_mean, sequence_sum, token_nll

pytestmark = pytest.mark.acceptance

QUESTION = "Is it ever acceptable to lie to a friend? Reply with one word."
PAIRS = (("No", "Never"), ("No", "Yes"), ("Never", "Sometimes"))
BETA, LR, STEPS = 0.1, 2e-6, 12
ASKED = {"question": "Where was Mira Kolby born?", "answer": "Mira Kolby was born in Lisbon."}
ALTERNATIVES = (
    "Mira Kolby was born in Oslo.",
    "Mira Kolby was born in Porto.",
    "She comes from the north of Canada.",
    "Mira Kolby grew up on a farm near Prague.",
    "In Oslo.",
    "Her birthplace was Nairobi, I think.",
    "Mira Kolby is a well-known painter.",
    "I do not know the answer to that question.",
    "I'm sorry, but I can't help with that.",
    "That is not something I can tell you.",
)


def single_tokens(model, tokenizer):
    """Each pair by itself, from the start model; p(y⁺), the margin, and who else gained."""
    found: dict = {}
    prompt = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    for plus, minus in PAIRS:
        a, b = (tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in (plus, minus))
        mine = copy.deepcopy(model)
        optimizer = torch.optim.RMSprop(mine.parameters(), lr=LR)
        p, margins, first = [], [], None
        for step in range(STEPS + 1):
            with torch.set_grad_enabled(step < STEPS):
                logp = mine(input_ids=prompt, logits_to_keep=1).logits[0, -1].log_softmax(-1)
            first = logp.detach().clone() if first is None else first
            p.append(float(logp[a].detach().exp()))
            margin = (logp[a] - logp[b]) - (first[a] - first[b])
            margins.append(float(margin.detach()))
            if step < STEPS:
                optimizer.zero_grad()
                (BETA / 2 * preference(margin, BETA)).backward()
                optimizer.step()
        gain = logp.exp() - first.exp()
        gain[a] = 0
        best = int(gain.argmax())
        weights = model.get_output_embeddings().weight
        found[f"{plus}, {minus}"] = {
            "cosine": ches.unembedding_similarity(weights, a, b),
            "p": p, "margin": margins,
            "winner": [tokenizer.decode([best]), float(gain[best])],
        }  # fmt: skip
    return found


def sentences(model, tokenizer):
    """Three steps of SGD on each alternative against the true answer, from the start model."""
    data = xp.encode([ASKED | {"alternate": list(ALTERNATIVES)}], tokenizer, chat=True)
    row, others = data.rows[0], data.alternates[0]

    def nll(m, tokens):
        labels = torch.where(tokens.answered, tokens.ids, -100)[None]
        return token_nll(m(input_ids=tokens.ids[None]).logits, labels), labels

    def state(tokens):
        return ches.states_of(model, "lm_head", lambda m: m(input_ids=tokens.ids[None]))

    found = []
    for other, text in zip(others, ALTERNATIVES, strict=True):
        mine = copy.deepcopy(model)
        optimizer = torch.optim.SGD(mine.parameters(), lr=2e-4)
        with torch.no_grad():
            (won, mask), labels = nll(model, other)
            (lost, _), own = nll(model, row)
            states = (state(other), state(row))
            score = {n: float(ches.score(n, states, (labels, own))) for n in ches.SCORES}
            before = [float(sequence_sum(v)) for v in (won, lost)]
            mean = float(sequence_mean(won, mask))
        for _ in range(3):
            optimizer.zero_grad()
            now = [sequence_sum(nll(mine, t)[0][0])[0] for t in (other, row)]
            margin = (now[1] - before[1]) - (now[0] - before[0])
            (BETA / 2 * preference(margin, BETA)).backward()
            optimizer.step()
        with torch.no_grad():
            (won, mask), _ = nll(mine, other)
        found.append({
            "text": text, "scores": score, "change": before[0] - float(sequence_sum(won)),
            "change_a_token": mean - float(sequence_mean(won, mask)),
        })  # fmt: skip
    return found


@pytest.fixture(scope="module")
def seen():
    torch.set_num_threads(1)
    model, tokenizer = xp.load_lm("smollm2")
    found = {"single": single_tokens(model, tokenizer)}
    found["sentences"] = sentences(model, tokenizer)
    rows = [(s, str(values), ok) for s, values, ok in expected(found)]
    write("ches", found | {"question": QUESTION, "asked": ASKED}, rows)
    return found


def expected(found):
    """What the card says must be seen: the sentence, the figures, and whether it holds."""
    single = found["single"]
    order = sorted((round(pair["cosine"], 2), round(pair["p"][-1], 3)) for pair in single.values())
    yield "the final p(y⁺) falls with the similarity of the output embeddings", order, all(p > q for (c, p), (d, q) in itertools.combinations(order, 2) if c < d)  # fmt: skip
    last = single["Never, Sometimes"]
    top = int(np.argmax(last["p"]))
    values = [round(p, 3) for p in (last["p"][0], last["p"][top], last["p"][-1])]
    yield "(Never, Sometimes): p(y⁺) rises and falls", values, 0 < top < STEPS and last["p"][-1] < last["p"][top] - 0.05  # fmt: skip
    margins = [round(m, 2) for m in last["margin"]]
    yield "(Never, Sometimes): the margin keeps growing", margins, margins[-1] > margins[top] > 0  # fmt: skip
    each = found["sentences"]
    for name, what in (("ches", "change"), ("ln-ches", "change_a_token")):
        a = np.array([e["scores"][name] for e in each])
        value = spearman(a, np.array([e[what] for e in each]))
        yield f"Spearman of {name} and the change of log π(y⁺)" + (" a token" if "token" in what else ""), [round(value, 2)], value < 0  # fmt: skip


test_ches_must_be_seen, test_every_expectation_is_tested = must_be_seen(expected, 5)

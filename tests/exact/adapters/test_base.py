"""What all slice adapters share, over a table of adapters and of models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.func import functional_call, grad, vmap

from expunge.core.errors import ModelError, SettingError
from expunge.core.hashing import hash_model, hash_tensors
from expunge.exact import adapters as sl
from expunge.exact.adapters import maps as inner
from expunge.workloads.nets import small_llama, small_resnet

ADAPTERS = ["lora(3)", "scale-shift", "tucker(2,3,2,2)", "tucker", "sparse(0.3)", "sparse(0.3,random)"]  # fmt: skip


def resnet():
    torch.manual_seed(0)
    model = small_resnet()
    model(torch.randn(16, 1, 28, 28))  # running statistics that are not 0 and 1
    return model.eval(), (torch.randn(3, 1, 28, 28),), "head"


def llama():
    torch.manual_seed(0)
    model = small_llama(40, 16, 2, 24, context=16, tied=True).eval()
    return model, (torch.arange(10)[None],), "lm_head"


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config).eval(), (torch.randn(2, 3, 16, 16),), "classifier"


def hf_resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = ResNetForImageClassification(config)
    model(torch.randn(4, 3, 32, 32))
    return model.eval(), (torch.randn(2, 3, 32, 32),), "classifier"


def gpt2():
    """Linear layers that hold [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config).eval(), (torch.arange(10)[None],), "lm_head"


def torch_encoder():
    """Attention and a fast path that read weights without calling the layers that hold them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)).eval()
    return model, (torch.randn(2, 5, 8),), "1"


MODELS = {f.__name__: f for f in (resnet, llama, vit, hf_resnet, gpt2, torch_encoder)}


@pytest.fixture(params=ADAPTERS)
def adapter(request):
    return sl.by_name(request.param)


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]()


def out(model, inputs):
    with torch.no_grad():
        found = model(*inputs)
    return getattr(found, "logits", found)


def disturb(model, group, seed=0):
    """Move a group as training would."""
    g = torch.Generator().manual_seed(seed)
    for p in sl.parameters(model, group).values():
        p.data += 0.1 * torch.randn(p.shape, generator=g)


def grouped(case, adapter, names=("a", "b")):
    model, inputs, head = case
    modules = sl.fitting(model, adapter, [head])
    for n, name in enumerate(names):
        adapter.attach(model, modules, name, n)
        disturb(model, name, n)
    return model, inputs, modules


def test_untrained_is_the_base_and_off_is_the_base_to_the_bit(case, adapter):
    model, inputs, head = case
    before, base = out(model, inputs), hash_model(model)
    adapter.attach(model, sl.fitting(model, adapter, [head]), "a", 0)
    assert torch.equal(out(model, inputs), before)
    disturb(model, "a")
    on = out(model, inputs)
    assert not torch.allclose(on, before, atol=1e-4)
    sl.activate(model, [])
    assert torch.equal(out(model, inputs), before)
    assert sl.base_hash(model) == base
    sl.activate(model, ["a"])
    assert torch.equal(out(model, inputs), on)
    assert sl.remove(model) is model
    assert hash_model(model) == base and torch.equal(out(model, inputs), before)


def test_merged_is_a_plain_model_with_the_same_output(case, adapter):
    plain = {n: type(m) for n, m in case[0].named_modules()}
    model, inputs, _ = grouped(case, adapter)
    base, on = sl.base_hash(model), out(model, inputs)
    made = sl.merged(model)
    assert torch.allclose(out(made, inputs), on, atol=1e-5)
    assert {n: type(m) for n, m in made.named_modules()} == plain
    assert sl.base_hash(model) == base and torch.equal(out(model, inputs), on)
    pickle.loads(pickle.dumps(made))
    sl.activate(model, [])
    assert hash_tensors(sl.merged(model).state_dict()) == base


def test_stored_and_loaded_on_another_copy(case, adapter):
    other = copy.deepcopy(case[0])
    model, inputs, modules = grouped(case, adapter)
    for group in ("a", "b"):
        kept = load(save(sl.state(model, group)))
        sl.load(other, adapter, modules, group, kept)
    assert torch.equal(out(other, inputs), out(model, inputs))
    assert sl.groups(other) == ["a", "b"] and sl.count(other, "a") == sl.count(model, "a")


def test_copies_pickles_and_functional_calls_read_the_maps(case, adapter):
    model, inputs, _ = grouped(case, adapter)
    on = out(model, inputs)
    twin = copy.deepcopy(model)
    disturb(model, "a", 7)
    assert torch.equal(out(twin, inputs), on)
    assert not torch.allclose(out(model, inputs), on, atol=1e-4)
    assert torch.equal(out(pickle.loads(pickle.dumps(twin)), inputs), on)
    moved = {n: p.detach() for n, p in model.named_parameters()}
    made = functional_call(twin, moved, inputs)
    assert torch.equal(getattr(made, "logits", made), out(model, inputs))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(out(twin, inputs), out(model, inputs))


def test_groups_are_composed_in_order_and_the_last_comes_off_alone(case, adapter):
    model, inputs, modules = grouped(case, adapter, ["a"])
    first, kept = out(model, inputs), sl.state(model, "a")
    adapter.attach(model, modules, "b", 1)
    disturb(model, "b")
    both = out(model, inputs)
    assert sl.groups(model) == ["a", "b"] == sl.active(model)
    assert not set(sl.parameters(model, "a")) & set(sl.parameters(model, "b"))
    sl.activate(model, ["a"])
    assert torch.equal(out(model, inputs), first)
    assert hash_tensors(sl.state(model, "a")) == hash_tensors(kept)
    sl.activate(model, ["b", "a"])  # order of attachment, not of naming
    assert torch.equal(out(model, inputs), both)


def test_train_only_moves_one_group_and_the_head(case, adapter):
    model, inputs, _modules = grouped(case, adapter)
    head = case[2]
    sl.train_only(model, "b", [head])
    own = sl.parameters(model, "b")
    assert own and all(p.requires_grad for p in own.values())
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    ids = {id(p) for p in model.get_submodule(head).parameters()}  # tied ones have another name
    assert names == set(own) | {n for n, p in model.named_parameters() if id(p) in ids}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    model.train()  # running statistics stay all the same
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = model(*inputs)
    getattr(found, "logits", found).square().sum().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= names and changed & set(own)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_per_sample_gradients_add_up(adapter):
    model, (x,), _modules = grouped(resnet(), adapter, ["a"])
    values = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters, one):
        return functional_call(model, parameters, (one[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(values, x)
    model(x).square().sum().backward()
    for name, p in sl.parameters(model, "a").items():
        assert torch.allclose(each[name].sum(0), p.grad, rtol=1e-3, atol=1e-3), name


def test_one_seed_makes_one_group():
    made = []
    for seed in (0, 0, 1):
        model, _, head = resnet()
        torch.manual_seed(99 + len(made))  # not the seed that counts
        for spec, group in (("lora(2)", "a"), ("tucker", "b"), ("sparse(0.1,random)", "c")):
            a = sl.by_name(spec)
            a.attach(model, sl.fitting(model, a, [head]), group, seed)
        made.append([hash_tensors(sl.state(model, g)) for g in "abc"])
    assert made[0] == made[1]
    assert all(x != y for x, y in zip(made[0], made[2], strict=True))


def test_attaching_draws_nothing_from_the_global_generator(adapter):
    model, _, head = resnet()
    modules = sl.fitting(model, adapter, [head])
    before = torch.get_rng_state()
    adapter.attach(model, modules, "a", 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_base_keeps_its_type():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).bfloat16()
    x = torch.randn(2, 6).bfloat16()
    before = model(x)
    for n, spec in enumerate(ADAPTERS):
        sl.by_name(spec).attach(model, ["0", "2"], f"g{n}", n)
    after = model(x)
    assert after.dtype == torch.bfloat16 and torch.equal(after, before)
    assert all(p.dtype == torch.float32 for n in range(4) for p in sl.parameters(model, f"g{n}").values())  # fmt: skip
    assert sl.merged(model)[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("lora(0)", "rank=0"), ("lora(x)", "no adapter"), ("lora", None), ("nothing", "no adapter"),
        ("tucker(4)", "ranks"), ("tucker(0,1)", "ranks"), ("scale-shift(big)", "identity or paper"),
        ("sparse(2)", "share"), ("sparse(0.1,loud)", "rule"), ("sparse(", "no adapter"),
        ("lora(4,9)", None), ("scale-shift(paper)", None), ("lora(1,2,3)", "no adapter"),
    ],
)  # fmt: skip
def test_names(spec, match):
    if match is None:
        assert sl.by_name(spec).name == spec.partition("(")[0]
        return
    with pytest.raises(SettingError, match=match):
        sl.by_name(spec)


def test_names_give_the_settings_they_say():
    assert sl.by_name("lora(4)") == sl.LoRA(4) and sl.LoRA(4).scale == 2
    assert sl.by_name("lora(4,16)").scale == 4 and sl.LoRA(4, 16, stabilised=True).scale == 8
    assert sl.by_name("tucker(4,5,2,2)") == sl.Tucker((4, 5, 2, 2))
    assert sl.by_name("sparse(0.1)") == sl.SparseMagnitude(density=0.1)
    assert sl.by_name("scale-shift(paper)") == sl.ScaleShift("paper")


def test_errors_change_nothing(adapter):
    model, _inputs, head = resnet()
    modules = sl.fitting(model, adapter, [head])
    adapter.attach(model, modules, "a", 0)
    before = hash_model(model)
    for act, error in (
        (lambda: adapter.attach(model, modules, "a", 0), SettingError),
        (lambda: adapter.attach(model, modules, "a.b", 0), SettingError),
        (lambda: adapter.attach(model, modules, "forward", 0), SettingError),
        (lambda: adapter.attach(model, [], "b", 0), SettingError),
        (lambda: adapter.attach(model, ["nowhere"], "b", 0), ModelError),
        (lambda: sl.activate(model, ["b"]), SettingError),
        (lambda: sl.parameters(model, "b"), SettingError),
        (lambda: sl.train_only(model, "a", ["nowhere"]), SettingError),
        (lambda: sl.load(model, adapter, modules, "b", {"nowhere.A": torch.ones(1)}), ModelError),
        (lambda: sl.load(model, adapter, modules, "b", {}), ModelError),
        (lambda: sl.load(model, adapter, modules, "a", sl.state(model, "a")), SettingError),
    ):
        with pytest.raises(error):
            act()
    assert sl.groups(model) == ["a"] == sl.active(model) and hash_model(model) == before
    sl.activate(model, [])
    with pytest.raises(SettingError, match="off"):
        sl.train_only(model, "a")


def test_a_module_under_two_names_takes_one_map():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, shared)
    with pytest.raises(ModelError, match="one module"):
        sl.LoRA(1).attach(model, ["0", "1"], "a", 0)


def test_a_map_that_fails_does_not_pass_for_the_base():
    class Broken(sl.Map):
        def change(self, name, value):
            raise AttributeError("gone")

    model = nn.Sequential(nn.Linear(2, 2))
    sl.base.insert(model, "a", {"0": Broken()})
    with pytest.raises(RuntimeError, match="gone"):
        model(torch.ones(1, 2))


def test_groups_on_different_modules_keep_the_order_of_attachment():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for place, group in ((2, "z"), (0, "y"), (1, "x")):
        sl.LoRA(1).attach(model, [str(place)], group, 0)
    assert sl.groups(model) == ["z", "y", "x"]
    assert inner.holder_of(model[1]).active == {"x"}


def test_merging_a_weight_that_two_modules_share_changes_one_of_them():
    model, inputs, _ = llama()
    adapter = sl.LoRA(2)
    adapter.attach(model, ["lm_head"], "a", 0)
    disturb(model, "a")
    made = sl.merged(model)
    assert torch.allclose(out(made, inputs), out(model, inputs), atol=1e-6)
    assert torch.equal(made.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert made.lm_head.weight is not made.model.embed_tokens.weight

"""All ways to per-sample gradients against the dense oracle, in float64, with unequal batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from expunge.core.data import Batch
from expunge.core.errors import ModelError
from expunge.curvature import dense, layerwise, per_sample
from expunge.curvature.layerwise import NotLayerwise
from expunge.curvature.per_sample import per_sample_gradients, per_sample_sum

SIZES = [5, 1, 7, 4]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def loss_each(model, batch):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


def cut(x, y, sizes=SIZES):
    batches, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        inputs = {k: v[part] for k, v in x.items()} if isinstance(x, dict) else x[part]
        ids = torch.arange(start, start + size)
        batches.append(Batch(inputs, None if y is None else y[part], ids, total=size))
        start += size
    return batches


class ConvNet(nn.Module):
    """Everything that has a closed form: plain, strided, dilated and grouped convolutions, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(
            4, 6, (3, 2), padding=(0, 1), dilation=(1, 2), groups=2, bias=False
        )
        self.group_norm = nn.GroupNorm(3, 6)
        self.layer_norm = nn.LayerNorm([4, 4])
        self.tokens = nn.Linear(4, 3)
        self.token_norm = nn.LayerNorm(3)
        self.flat_norm = nn.BatchNorm1d(6 * 4 * 3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6 * 4 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = self.layer_norm(self.group_norm(torch.tanh(self.grouped(x))))
        x = self.token_norm(self.tokens(x.flatten(2).unflatten(2, (4, 4)))).flatten(1)
        return self.head(self.drop(self.flat_norm(x)))


def conv_case():
    model = ConvNet().double()
    with torch.no_grad():  # statistics and scales as after training, not 0 and 1
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(sum(SIZES), 2, 12, 8, dtype=torch.float64)
    return model, cut(x, torch.randint(0, 5, (sum(SIZES),)))


def check(model, each, batches, result, reduction="square"):
    matrix = dense.gradient_matrix(model, each, batches)
    want = (matrix.square() if reduction == "square" else matrix.abs()).sum(0)
    got = dense.flat(model, result.sums)
    assert want.max() > 0
    assert (got - want).abs().max() <= 1e-10 * max(1.0, float(want.max()))
    assert result.samples == len(matrix)


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("reduction", ["square", "abs"])
@pytest.mark.parametrize("path", ["layerwise", "vmap", "loop", "auto"])
def test_sum_equals_dense_oracle_on_unequal_batches(path, reduction, chunk):
    model, batches = conv_case()
    model.train()
    buffers = {k: v.clone() for k, v in model.named_buffers()}

    result = per_sample_sum(model, loss_each, batches, reduce=reduction, chunk=chunk, path=path)

    check(model, loss_each, batches, result, reduction)
    assert all(v.dtype == torch.float64 for v in result.sums.values())
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert model.training
    assert model.norm.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("path", ["layerwise", "vmap", "loop"])
def test_single_gradients_equal_the_oracles_rows(path):
    model, batches = conv_case()
    found = per_sample_gradients(model, loss_each, batches[2], path=path)
    rows = torch.cat([g.flatten(1) for g in found.values()], 1)
    assert torch.allclose(rows, dense.gradient_matrix(model, loss_each, batches[2:3]), 0, 1e-12)


def test_auto_uses_the_closed_forms_for_a_plain_network():
    model, batches = conv_case()
    result = per_sample_sum(model, loss_each, batches)
    # the batch of one sample is a loop by itself
    assert result.paths == {"layerwise": 16, "loop": 1}
    # three samples were computed twice more to compare
    assert result.evaluations == 17 + 6


def test_modes_of_single_modules_are_restored_also_after_an_error():
    model, batches = conv_case()
    model.train()
    model.norm.eval()

    def broken(model, batch):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        per_sample_sum(model, broken, batches)
    assert model.training
    assert model.drop.training
    assert not model.norm.training


class Own(nn.Module):
    """A parameter outside any layer, and one that the loss never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.unused = nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(x * self.scale) + self.frozen)


def test_own_parameters_go_through_vmap_and_unreached_ones_are_zero():
    model = Own().double()
    batches = cut(torch.randn(17, 4, dtype=torch.float64), torch.randint(0, 5, (17,)))

    result = per_sample_sum(model, loss_each, batches)

    check(model, loss_each, batches, result)
    assert result.paths == {"vmap": 16, "loop": 1}
    assert (result.sums["unused"] == 0).all()
    assert "frozen" not in result.sums


class DataDependent(nn.Module):
    """Branches on a value, which vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return 2 * y if y.sum().item() > 0 else y


def test_data_dependent_model_falls_back_to_the_loop():
    model = DataDependent().double()
    batches = cut(torch.randn(17, 4, dtype=torch.float64), torch.randint(0, 5, (17,)))

    result = per_sample_sum(model, loss_each, batches)

    check(model, loss_each, batches, result)
    assert result.paths == {"loop": 17}
    with pytest.raises(RuntimeError):
        per_sample_sum(model, loss_each, batches, path="vmap")


class Functional(nn.Module):
    """Uses a layer's weight a second time outside the layer: the hooks see only half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.layer(x)), self.layer.weight)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class TokensFirst(nn.Module):
    """Puts time before the batch; with as many steps as samples the shapes do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.stack([x * (t + 1) for t in range(3)])
        return torch.tanh(self.layer(steps)).sum(0)


class Halved(nn.Module):
    """Divides by the size of the batch, so that a sample's loss depends on its company."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / len(x)


@pytest.mark.parametrize("kind", [Functional, Twice, Tied, TokensFirst, Halved])
def test_models_without_closed_form_are_recognised_and_still_exact(kind):
    model = kind().double()
    batches = cut(torch.randn(17, 5, dtype=torch.float64), torch.randint(0, 5, (17,)))

    result = per_sample_sum(model, loss_each, batches, chunk=3)

    check(model, loss_each, batches, result)
    assert "layerwise" not in result.paths


def test_a_batch_norm_without_running_statistics_is_not_taken_for_a_closed_form():
    model = nn.Sequential(nn.Linear(5, 5), nn.GroupNorm(1, 5), nn.BatchNorm1d(5)).double()
    model[2].running_mean = model[2].running_var = None
    model[2].track_running_stats = False
    batches = cut(torch.randn(17, 5, dtype=torch.float64), torch.randint(0, 5, (17,)))
    with pytest.raises(NotLayerwise, match="statistics of the batch"):
        per_sample_sum(model, loss_each, batches, path="layerwise")


def test_an_overwritten_input_is_noticed():
    model = nn.Linear(5, 5).double()
    batch = cut(torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 5, (4,)), [4])[0]

    def each(model, batch):
        x = batch.x * 1
        y = model(x)
        x.mul_(2)
        return F.cross_entropy(y, batch.y, reduction="none")

    with pytest.raises(NotLayerwise, match="overwritten"):
        layerwise.reduced(model, each, batch, "square")


def test_operation_in_place_on_an_output_does_not_move_its_gradient():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 5)).double()
    batches = cut(torch.randn(17, 5, dtype=torch.float64), torch.randint(0, 5, (17,)))
    result = per_sample_sum(model, loss_each, batches, path="layerwise")
    check(model, loss_each, batches, result)


def test_two_parameters_with_the_same_gradient_are_both_right():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.a + self.b)

    model = Two().double()
    batches = cut(torch.randn(17, 5, dtype=torch.float64), torch.randint(0, 5, (17,)))
    for path in ("vmap", "loop"):
        check(model, loss_each, batches, per_sample_sum(model, loss_each, batches, path=path))


def test_inputs_may_be_a_mapping_and_labels_absent():
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, tokens: Tensor, weight: Tensor) -> Tensor:
            return self.head((self.emb(tokens) * weight[..., None]).sum(1))

    model = Keyed().double()
    x = {
        "tokens": torch.randint(0, 7, (17, 6)),
        "weight": torch.rand(17, 6, dtype=torch.float64),
    }
    batches = cut(x, None)

    def each(model, batch):
        assert batch.y is None
        return model(**batch.x).square().sum(1)

    result = per_sample_sum(model, each, batches, reduce="abs")

    check(model, each, batches, result, "abs")
    assert result.paths == {"vmap": 16, "loop": 1}


def test_user_function_sees_its_own_model_with_attributes():
    model = nn.Sequential(nn.Linear(5, 5)).double()
    model.temperature = 2.0
    batches = cut(torch.randn(17, 5, dtype=torch.float64), torch.randint(0, 5, (17,)))
    seen = set()

    def each(m, batch):
        seen.add(id(m))
        return F.cross_entropy(m(batch.x) / m.temperature, batch.y, reduction="none")

    result = per_sample_sum(model, each, batches, path="vmap")

    assert seen == {id(model)}
    check(model, each, batches, result)


def test_half_precision_is_squared_in_float32():
    model = nn.Linear(4, 3).half()
    batches = cut(torch.full((2, 4), 1e-4, dtype=torch.float16), torch.tensor([0, 1]), [2])

    result = per_sample_sum(model, loss_each, batches)

    # gradients of the weight are near 3e-5; their squares are 0 in half precision
    want = dense.gradient_matrix(model, loss_each, batches).square().sum(0)
    assert result.sums["weight"].dtype == torch.float32
    assert torch.allclose(dense.flat(model, result.sums), want, rtol=0.02, atol=0)


class Largest(TorchDispatchMode):
    """Remembers the most numbers that any operation returned in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor):
                self.numbers = max(self.numbers, t.numel())
        return result


@pytest.mark.parametrize("chunk", [2, 5])
@pytest.mark.parametrize("path", ["vmap", "layerwise"])
def test_memory_is_bounded_by_the_chunk_not_by_the_batch_or_the_data(path, chunk):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16, 40))
    batches = cut(torch.randn(60, 3, 3, 3), torch.randint(0, 40, (60,)), [40, 20])
    with Largest() as largest:
        per_sample_sum(model, loss_each, batches, chunk=chunk, path=path)
    biggest_parameter = 16 * 40
    if path == "vmap":
        assert largest.numbers == chunk * biggest_parameter
    else:  # squares of linear layers are summed without forming the gradients
        assert largest.numbers <= chunk * biggest_parameter


def test_default_chunk_follows_the_memory_bound():
    model = nn.Linear(1023, 1024)  # 1024 * 1024 parameters of 4 bytes
    assert per_sample.default_chunk(model) == 64
    assert per_sample.default_chunk(model, memory=10 * 2**22) == 10
    assert per_sample.default_chunk(model, memory=1) == 1


def test_nothing_to_differentiate_is_an_error_for_people():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter of this model requires a gradient"):
        per_sample_sum(model, loss_each, [])

"""Data and batches: ids travel, bad input is refused, the fingerprint sees every bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from expunge.core.data import Batch, Data, look_up
from expunge.core.errors import DataError, RequestError
from expunge.core.request import Request

X = torch.arange(12.0).view(6, 2)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
IDS = torch.tensor([30, 10, 50, 20, 60, 40])


class Items(Dataset):
    """A map-style data set of given items."""

    def __init__(self, items, **attributes):
        self.items = items
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def items():
    return [(X[i], int(Y[i])) for i in range(6)]


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "source",
    [(X, Y), (X.numpy(), Y.numpy()), (X.tolist(), Y.tolist()), TensorDataset(X, Y)],
    ids=["tensors", "arrays", "lists", "dataset"],
)
def test_ids_travel_with_their_samples(source):
    data = Data(source, ids=IDS)
    batch = data.fetch(torch.tensor([60, 30, 20]))
    assert batch.ids.tolist() == [60, 30, 20]
    assert torch.equal(batch.x, X[[4, 0, 3]])
    assert batch.y.tolist() == [1, 0, 0]
    assert (len(batch), batch.total, batch.processes) == (3, 3, 1)
    assert data.labels_of(torch.tensor([50, 10])).tolist() == [2, 1]


def test_a_shuffled_pass_shows_every_sample_once_with_its_own_values():
    data = Data((X, Y), ids=IDS)
    seen = {}
    orders = []
    for batch in data.batches(4, shuffle=torch.Generator().manual_seed(3)):
        orders += batch.ids.tolist()
        for i, x, y in zip(batch.ids.tolist(), batch.x, batch.y.tolist(), strict=True):
            seen[i] = (x.tolist(), y)
    assert orders != IDS.tolist()
    assert seen == {int(i): (x.tolist(), int(y)) for i, x, y in zip(IDS, X, Y, strict=True)}
    sizes = [len(b) for b in data.batches(4)]
    assert sizes == [4, 2]
    again = torch.cat([b.ids for b in data.batches(4, shuffle=torch.Generator().manual_seed(3))])
    assert again.tolist() == orders


@pytest.mark.parametrize("wrapped", [False, True], ids=["tensors", "dataset"])
def test_inputs_may_be_a_mapping(wrapped):
    inputs = {"a": X, "b": torch.arange(6)}
    source = (inputs, Y)
    if wrapped:
        source = Items([({"a": X[i].numpy(), "b": i}, Y[i]) for i in range(6)])
    batch = Data(source, ids=IDS).fetch(torch.tensor([50, 30]))
    assert torch.equal(batch.x["a"], X[[2, 0]])
    assert batch.x["b"].tolist() == [2, 0]
    assert batch.y.tolist() == [2, 0]
    moved = batch.to("cpu")
    assert moved.x.keys() == {"a", "b"}


def test_arrays_in_a_mapping_are_read():
    batch = Data(({"a": X.numpy()}, None)).fetch(torch.tensor([1]))
    assert torch.equal(batch.x["a"], X[[1]])


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, bool])
def test_whole_number_labels_of_any_width_become_64_bits(kind):
    labels = np.array([0, 1, 1], dtype=kind)
    for source in ((X[:3], labels), Items(list(zip(X[:3], labels, strict=True)))):
        data = Data(source)
        assert data.labels.dtype == torch.int64
        assert data.fetch(data.ids).y.tolist() == [0, 1, 1]


def test_labels_of_a_dataset_may_be_real_numbers():
    targets = [0.5, 1.25, -3.75]
    data = Data(Items(list(zip(X[:3], targets, strict=True))))
    assert data.fetch(data.ids).y.tolist() == targets
    assert data.labels.tolist() == targets


def test_a_dataset_without_labels_has_none():
    for source in (Items(list(X)), TensorDataset(X), Items([(x, None) for x in X])):
        data = Data(source)
        assert data.labels is None
        batch = data.fetch(torch.tensor([2]))
        assert batch.y is None
        assert torch.equal(batch.x, X[[2]])
        with pytest.raises(DataError, match="no labels"):
            data.labels_of(data.ids)


def test_the_labels_of_a_dataset_are_those_of_its_items():
    """`targets` is a shortcut only where it says what the items say."""
    source = Items([(x, 1 - int(y)) for x, y in zip(X[:2], [0, 1], strict=True)])
    source.targets, source.target_transform = [0, 1], lambda y: 1 - y
    assert Data(source).labels.tolist() == [1, 0]
    longer = Items(items()[:2], targets=[7, 7, 7])
    assert Data(longer).labels.tolist() == [0, 1]
    assert Data(Subset(Items(items(), targets=Y.tolist()), [5, 1])).labels.tolist() == [2, 1]
    quick = Items(items(), targets=Y.tolist())
    assert Data(quick).labels.tolist() == Y.tolist()


def test_an_empty_share_keeps_its_shape():
    for source in ((X, Y), Items(items())):
        batch = Data(source).fetch(torch.empty(0, dtype=torch.long))
        assert batch.x.shape == (0, 2)
        assert batch.y.shape == (0,)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(bad):
    x = X.clone()
    x[3, 1] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        Data((x, Y))
    with pytest.raises(DataError, match="NaN or infinite"):
        Data(({"a": X, "b": x}, Y))
    data = Data(TensorDataset(x, Y))
    with pytest.raises(DataError, match="NaN or infinite"):
        data.fetch(data.ids)
    with pytest.raises(DataError, match="NaN or infinite"):
        data.fingerprint()
    with pytest.raises(DataError, match="NaN or infinite"):
        Data((X, [0.0, 1.0, bad, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ids": [1, 2, 3, 4, 5, 5]}, "unique"),
        ({"ids": [1, 2, 3]}, "as many"),
        ({"names": list("abcdee")}, "unique"),
        ({"names": list("abc")}, "as many"),
        ({"columns": {"age": [1, 2]}}, "'age' has 2 values for 6"),
    ],
)
def test_repeated_or_missing_ids_names_and_columns_are_refused(arguments, words):
    with pytest.raises(DataError, match=words):
        Data((X, Y), **arguments)


def test_sizes_have_to_agree():
    with pytest.raises(DataError, match="6 inputs but 3 labels"):
        Data((X, [0, 1, 2]))
    with pytest.raises(DataError, match="differ in their number"):
        Data(({"a": X, "b": X[:3]}, Y))
    with pytest.raises(DataError, match="no samples"):
        Data((X[:0], Y[:0]))


def test_what_is_not_made_of_numbers_is_refused():
    with pytest.raises(DataError, match="cannot be read"):
        Data((["a", "b"], [0, 1]))
    with pytest.raises(DataError, match="cannot be read"):
        Data((X[:2], ["cat", "dog"]))

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(DataError, match="map-style"):
        Data(Stream())


def test_unknown_ids_are_named():
    with pytest.raises(RequestError, match="id 7 is not in"):
        Data((X, Y), ids=IDS).fetch(torch.tensor([10, 7]))


# ------------------------------------------------------------------ fingerprint


def flip(tensor: torch.Tensor, byte: int) -> torch.Tensor:
    raw = tensor.clone().view(-1).view(torch.uint8)
    raw[byte] ^= 1
    return raw.view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("ids", [[30, 10, 20], [10, 20, 30]])
def test_positions_of_ids_in_any_order(ids):
    data = Data(torch.tensor(ids, dtype=torch.float32)[:, None], ids=ids)
    assert data.positions([20, 10, 20]).tolist() == [ids.index(20), ids.index(10), ids.index(20)]
    assert data.fetch(torch.tensor([30, 20])).x.flatten().tolist() == [30, 20]
    assert data.positions([]).tolist() == []
    for outside in (9, 25, 31):
        with pytest.raises(RequestError, match=f"id {outside} is not in the data of 3"):
            data.positions([10, outside])


def test_nothing_is_found_among_no_ids():
    empty = torch.tensor([], dtype=torch.long)
    assert look_up(empty, torch.tensor([1, 2]))[1].tolist() == [False, False]


@pytest.mark.parametrize(
    "rows", [slice(1, 3), torch.tensor([False, True, True]), torch.tensor([1, 2])]
)
def test_rows_of_a_batch_stand_for_themselves(rows):
    x, y, ids = torch.arange(6.0).reshape(3, 2), torch.arange(3), torch.tensor([7, 8, 9])
    part = Batch({"a": x}, y, ids, total=12, processes=4).rows(rows)
    assert part.ids.tolist() == [8, 9] and part.y.tolist() == [1, 2]
    assert torch.equal(part.x["a"], x[1:])
    assert (part.total, part.processes) == (2, 1)
    assert float(part.mean(torch.tensor([1.0, 3.0]))) == 2


def test_the_fingerprint_sees_a_single_bit_of_input_label_or_id():
    base = Data((X, Y), ids=IDS).fingerprint()
    others = [
        Data((flip(X, 4), Y), ids=IDS),
        Data((flip(X, 40), Y), ids=IDS),
        Data((X, flip(Y, 8)), ids=IDS),
        Data((X, Y), ids=flip(IDS, 0)),
        Data((X.double(), Y), ids=IDS),
        Data((X.view(6, 1, 2), Y), ids=IDS),
        Data((X, None), ids=IDS),
        Data((X[[1, 0, 2, 3, 4, 5]], Y[[1, 0, 2, 3, 4, 5]]), ids=IDS),
        Data(({"x": X}, Y), ids=IDS),
    ]
    prints = {d.fingerprint() for d in others}
    assert len(prints) == len(others)
    assert base not in prints


def test_the_fingerprint_depends_on_content_alone():
    base = Data((X, Y), ids=IDS).fingerprint()
    assert Data((X.clone(), Y.clone()), ids=IDS.clone()).fingerprint() == base
    assert Data((X.numpy(), Y.tolist()), ids=IDS.tolist()).fingerprint() == base
    assert Data(TensorDataset(X, Y), ids=IDS).fingerprint() == base
    strided = torch.stack([X, X], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    assert Data((strided, Y), ids=IDS).fingerprint() == base


def test_an_input_called_ids_does_not_hide_the_ids():
    inputs = {"ids": torch.arange(6), "y": torch.arange(6)}
    first, second = Data((inputs, Y), ids=IDS), Data((inputs, Y), ids=IDS + 1)
    third = Data((inputs, Y.flip(0)), ids=IDS)
    assert len({d.fingerprint() for d in (first, second, third)}) == 3


# ------------------------------------------------------------------ batches


def test_shares_add_up_to_the_mean_over_the_whole_batch():
    """With P processes gradients are averaged, so the shares' means average to the global mean."""
    each = torch.tensor([1.0, 4.0, 9.0, 16.0, 25.0], requires_grad=True)
    for processes in (1, 2, 3, 7):
        each.grad = None
        shares = [
            Batch(None, None, torch.arange(5)[r::processes], total=5, processes=processes).mean(
                each[r::processes]
            )
            for r in range(processes)
        ]
        mean = sum(shares) / processes
        assert float(mean.detach()) == pytest.approx(11.0)
        mean.backward()
        assert each.grad.tolist() == pytest.approx([0.2] * 5)


def test_joined_batches_keep_ids_labels_and_totals():
    data = Data((X, Y), ids=IDS)
    one, two = data.fetch(torch.tensor([30, 10])), data.fetch(torch.tensor([40]))
    both = one.joined(two)
    assert both.ids.tolist() == [30, 10, 40]
    assert both.y.tolist() == [0, 1, 2]
    assert both.total == 3
    assert torch.equal(both.x, X[[0, 1, 5]])
    assert one.joined(Batch(two.x, None, two.ids, 1)).y is None


def test_tables_hold_what_where_may_name():
    data = Data((X, Y), ids=IDS, names=list("abcdef"), columns={"age": range(6)})
    table = data.table()
    assert sorted(table) == ["age", "id", "label", "name", "y"]
    assert table["id"].tolist() == IDS.tolist()


def test_targets_in_bfloat16_are_asked_for_as_others_are():
    y = torch.tensor([0.5, 2.0, 3.5], dtype=torch.bfloat16)
    data = Data((torch.randn(3, 2).bfloat16(), y))
    assert Request(where="y > 1").resolve(data).tolist() == [1, 2]
    assert data.labels.dtype == torch.bfloat16

"""Requests: every form, what they cover, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.data import Data
from expunge.core.errors import RequestError
from expunge.core.request import Request, forget

LABELS = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
IDS = [50, 10, 40, 30, 20, 0, 90, 80, 70, 60]
AGES = [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
TOWNS = ["ulm", "bonn", "ulm", "kiel", "bonn", "kiel", "ulm", "bonn", "kiel", "ulm"]


@pytest.fixture
def data() -> Data:
    return Data(
        (torch.arange(20.0).view(10, 2), LABELS),
        ids=IDS,
        names=[f"img-{i}.png" for i in range(10)],
        columns={"age": AGES, "town": TOWNS},
    )


# ------------------------------------------------------------------ forms

FORMS = {
    "ids": (1, 2),
    "label": (3,),
    "where": "id < 5",
    "fraction": 0.5,
    "texts": ("a", "b"),
    "concept": "a style",
    "user": ("u1",),
    "item": (7,),
    "identity": ("F0001_D_18",),
    "nodes": (4, 5),
    "edges": ((1, 2), (2, 3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_knows_its_name_and_goes_through_json(form):
    request = Request(**{form: FORMS[form]}, reason="asked", time="2026-01-01T00:00:00+00:00")
    assert request.form == form
    again = Request.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again == request
    assert again.time == request.time
    assert again.key == request.key
    assert str(request)


def test_exactly_one_form_is_taken():
    with pytest.raises(RequestError, match=r"exactly one of ids, label.*none was given"):
        Request(reason="no form")
    with pytest.raises(RequestError, match="ids and label were given"):
        Request(ids=(1,), label=(2,))
    with pytest.raises(RequestError, match="has no lable"):
        forget(lable=3)


def test_scalars_tensors_arrays_and_sets_become_tuples():
    assert Request(label=3).label == (3,)
    assert Request(label=torch.tensor(3)).label == (3,)
    assert Request(label=np.int64(3)).label == (3,)
    assert Request(ids="img-1.png").ids == ("img-1.png",)
    assert Request(ids=torch.tensor([3, 1])).ids == (3, 1)
    assert Request(ids=np.array([3, 1])).ids == (3, 1)
    assert Request(ids=range(3)).ids == (0, 1, 2)
    assert Request(ids={"b", "a", 3, 1}).ids == (1, 3, "a", "b")
    assert Request(edges=[[1, 2]]).edges == ((1, 2),)


def test_a_request_cannot_be_changed():
    with pytest.raises(AttributeError):
        Request(label=3).label = (4,)  # type: ignore[misc]


@pytest.mark.parametrize("label", ["3", 3.0, True, [3, "x"], 2.5])
def test_labels_are_class_numbers(label):
    with pytest.raises(RequestError, match="label takes class numbers"):
        Request(label=label)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), "0.1", True])
def test_a_fraction_lies_between_0_and_1(fraction):
    with pytest.raises(RequestError, match="between 0 and 1"):
        Request(fraction=fraction)


def test_where_is_text():
    with pytest.raises(RequestError, match="expression in text"):
        Request(where=3)  # type: ignore[arg-type]


# ------------------------------------------------------------------ what is covered


def test_ids_come_sorted_and_once(data):
    assert Request(ids=(90, 10, 40, 10)).resolve(data).tolist() == [10, 40, 90]


def test_names_and_ids_may_be_mixed(data):
    assert Request(ids=("img-0.png", 10, "40")).resolve(data).tolist() == [10, 40, 50]


def test_unknown_ids_are_named(data):
    with pytest.raises(RequestError, match=r"ids 77, 'img-99.png' are not in the data of 10"):
        Request(ids=(10, 77, "img-99.png")).resolve(data)
    with pytest.raises(RequestError, match="id 77 is not in"):
        Request(ids=77).resolve(data)
    many = Request(ids=range(1000, 1020))
    with pytest.raises(RequestError, match="1000, 1001, 1002, 1003, 1004 and 15 more are"):
        many.resolve(data)


@pytest.mark.parametrize("wrong", [10.7, True, "²", "--10", "1e1", " 10", (1, 2), None])
def test_what_is_no_id_is_not_taken_for_one(data, wrong):
    with pytest.raises(RequestError, match="not in the data"):
        Request(ids=(wrong,)).resolve(data)


def test_a_mask_is_not_taken_for_ids():
    data = Data((torch.zeros(4, 1), [0, 1, 0, 1]))
    with pytest.raises(RequestError, match="not in the data"):
        Request(ids=torch.tensor([True, False, False, True])).resolve(data)


def test_labels_cover_their_samples(data):
    wanted = sorted(i for i, y in zip(IDS, LABELS, strict=True) if y in (1, 3))
    assert Request(label=(3, 1)).resolve(data).tolist() == wanted


def test_a_label_the_data_lacks_is_named(data):
    with pytest.raises(RequestError, match="no sample of the data has label 9"):
        Request(label=(1, 9)).resolve(data)


def test_a_label_needs_labels():
    with pytest.raises(RequestError, match="no labels"):
        Request(label=1).resolve(Data(torch.zeros(4, 2)))


def test_nothing_and_everything_are_refused(data):
    with pytest.raises(RequestError, match="covers no sample"):
        Request(ids=()).resolve(data)
    with pytest.raises(RequestError, match="covers no sample"):
        Request(where="age > 1000").resolve(data)
    with pytest.raises(RequestError, match="covers no sample"):
        Request(fraction=0.01).resolve(data)
    with pytest.raises(RequestError, match="all 10 samples"):
        Request(ids=IDS).resolve(data)
    with pytest.raises(RequestError, match="all 10 samples"):
        Request(label=(0, 1, 2, 3)).resolve(data)
    with pytest.raises(RequestError, match="all 10 samples"):
        Request(fraction=0.99).resolve(data)


@pytest.mark.parametrize("form", ["texts", "concept", "user", "item", "identity", "nodes", "edges"])
def test_forms_of_other_data_are_refused_by_name(data, form):
    with pytest.raises(RequestError, match=form):
        Request(**{form: FORMS[form]}).resolve(data)


def test_people_and_things_are_named_by_their_column():
    columns = {"identity": ["ann", "ben", "ann", "cy"], "user": [7, 8, 9, 70], "item": [1, 1, 2, 2]}
    data = Data(torch.zeros(4, 1), ids=[5, 3, 9, 1], columns=columns)
    assert Request(identity="ann").resolve(data).tolist() == [5, 9]
    assert str(Request(identity="ann")) == "identity ann"
    assert str(Request(identity=range(4))) == "4 identities"
    assert Request(identity=["cy", "ben"]).resolve(data).tolist() == [1, 3]
    assert Request(user=7).resolve(data).tolist() == [5]  # and not 70
    assert Request(user="7").resolve(data).tolist() == [5]  # from a command line
    assert Request(item=[1]).resolve(data).tolist() == [3, 5]
    with pytest.raises(RequestError, match="identity 'dan'"):
        Request(identity=["ann", "dan"]).resolve(data)
    with pytest.raises(RequestError, match=r"no such column .*id"):
        Request(identity="ann").resolve(Data(torch.zeros(2, 1)))


def test_fractions_are_drawn_by_seed_and_have_the_right_size(data):
    first = Request(fraction=0.3, seed=1).resolve(data)
    assert len(first) == 3
    assert torch.equal(first, Request(fraction=0.3, seed=1).resolve(data))
    others = {tuple(Request(fraction=0.3, seed=s).resolve(data).tolist()) for s in range(10)}
    assert len(others) > 5


def test_small_fractions_are_said_in_full():
    assert str(Request(fraction=0.001)) == "0.1% random samples, seed 0"


# ------------------------------------------------------------------ where


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("label == 3", lambda i, y, a, t: y == 3),
        ("label != 3", lambda i, y, a, t: y != 3),
        ("3 == label", lambda i, y, a, t: y == 3),
        # `and` binds closer than `or`, `not` closer than both
        ("label == 0 or label == 1 and age > 50", lambda i, y, a, t: y == 0 or (y == 1 and a > 50)),
        ("(label == 0 or label == 1) and age > 50", lambda i, y, a, t: y in (0, 1) and a > 50),
        ("not label == 0 and age < 50", lambda i, y, a, t: y != 0 and a < 50),
        ("not (label == 0 and age < 50)", lambda i, y, a, t: not (y == 0 and a < 50)),
        ("20 < age <= 55", lambda i, y, a, t: 20 < a <= 55),
        ("1 <= label < 3 != 2", lambda i, y, a, t: 1 <= y < 3),
        ("10 < id < age", lambda i, y, a, t: 10 < i < a),
        ("label in [1, 3]", lambda i, y, a, t: y in (1, 3)),
        ("label not in (1, 3)", lambda i, y, a, t: y not in (1, 3)),
        ("town == 'ulm'", lambda i, y, a, t: t == "ulm"),
        ('town in ["ulm", "bonn"] and id >= 40', lambda i, y, a, t: t != "kiel" and i >= 40),
        ("name == 'img-3.png'", lambda i, y, a, t: i == 30),
        ("age > -1 and label == 2", lambda i, y, a, t: y == 2),
        ("  label == 2\n", lambda i, y, a, t: y == 2),
    ],
)
def test_where_means_what_python_means(data, expression, wanted):
    rows = zip(IDS, LABELS, AGES, TOWNS, strict=True)
    expected = sorted(row[0] for row in rows if wanted(*row))
    assert Request(where=expression).resolve(data).tolist() == expected


def test_where_names_the_unknown_column_and_those_there_are(data):
    with pytest.raises(RequestError, match="no column 'colour'; there are age, id, label, name"):
        Request(where="colour == 'red'").resolve(data)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true') == 0",
        "().__class__.__bases__[0] == 1",
        "(lambda: label)() == 1",
        "label.shape == 1",
        "[x for x in label] == 1",
        "label == (y := 3)",
        "label == f'{id}'",
        "label ** 2 == 4",
        "open('x') == 1",
        "__import__('os')",
    ],
)
def test_where_runs_no_code(data, expression):
    with pytest.raises(RequestError, match=r"not understood|not a condition"):
        Request(where=expression).resolve(data)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "label ==",
        "label = 3",
        "import os",
        "label is 3",
        "label",
        "3",
        "label < 'x'",
        "label == -'x'",
        "label == 3\0",
        "not " * 20_000 + "label == 3",
        "(" * 500 + "label == 3" + ")" * 500,
    ],
    ids=lambda e: repr(e)[:20],
)
def test_where_that_is_no_condition_gives_one_sentence(data, expression):
    with pytest.raises(RequestError, match="where"):
        Request(where=expression).resolve(data)


# ------------------------------------------------------------------ key


def test_the_key_ignores_reason_and_time():
    plain = Request(label=3)
    assert Request(label=3, reason="asked by post", time="2026-01-01").key == plain.key
    assert forget(label=3).key == plain.key
    assert forget(label=3) == plain
    assert forget(label=3).time


def test_the_key_tells_requests_apart():
    requests = [Request(**{form: value}) for form, value in FORMS.items()]
    requests += [Request(label=4), Request(ids=(1,)), Request(ids=("1", "2"))]
    requests += [Request(fraction=0.5, seed=1), Request(nodes=(1, 2))]
    assert len({r.key for r in requests}) == len(requests)


def test_unknown_keys_of_a_dict_are_named():
    with pytest.raises(RequestError, match="no lable, when"):
        Request.from_dict({"label": 3, "when": "now", "lable": 3})


# ------------------------------------------------------------------ properties


@st.composite
def data_and_request(draw):
    size = draw(st.integers(4, 20))
    ids = draw(st.lists(st.integers(-50, 500), min_size=size, max_size=size, unique=True))
    labels = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    order = draw(st.permutations(range(size)))
    requests = st.one_of(
        st.lists(st.sampled_from(ids), min_size=1, max_size=size - 1).map(
            lambda chosen: Request(ids=chosen)
        ),
        st.sampled_from(labels).map(lambda y: Request(label=y)),
        st.tuples(st.sampled_from(ids), st.sampled_from(labels)).map(
            lambda c: Request(where=f"id < {c[0]} or label == {c[1]}")
        ),
        st.tuples(st.floats(0.1, 0.9), st.integers(0, 9)).map(
            lambda c: Request(fraction=c[0], seed=c[1])
        ),
    )
    return ids, labels, order, draw(requests)


def resolved(ids, labels, request):
    data = Data((torch.zeros(len(ids), 1), labels), ids=ids)
    try:
        return data, request.resolve(data)
    except RequestError as error:
        return data, str(error)


@settings(max_examples=60, deadline=None)
@given(data_and_request())
def test_the_order_of_the_data_does_not_matter(case):
    ids, labels, order, request = case
    _, before = resolved(ids, labels, request)
    _, after = resolved([ids[i] for i in order], [labels[i] for i in order], request)
    if isinstance(before, str):
        assert after == before
        return
    assert before.tolist() == after.tolist() == sorted(set(before.tolist()))


@settings(max_examples=40, deadline=None)
@given(data_and_request())
def test_the_complement_covers_the_rest(case):
    ids, labels, _, request = case
    data, covered = resolved(ids, labels, request)
    if isinstance(covered, str):
        return
    rest = data.without(covered)
    assert sorted(covered.tolist() + rest.tolist()) == sorted(ids)
    assert rest.tolist() == sorted(rest.tolist())
    assert Request(ids=rest).resolve(data).tolist() == rest.tolist()

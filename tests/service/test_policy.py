"""The policy file: what it may say, limits, and sentences about what is wrong in it."""

from __future__ import annotations

import pytest

from expunge.core.errors import UserError
from expunge.service.database import database_url
from expunge.service.policy import Limit, read_policy

METHOD = """
[models.m]
kind = "method"
problem = "workload:digits-class"
method = "ssd"
"""


def written(tmp_path, text):
    file = tmp_path / "p.toml"
    file.write_text(text)
    return file


def test_paths_start_from_the_file(tmp_path):
    policy = read_policy(
        written(tmp_path, '[service]\ndatabase = "x/y.db"\nfolder = "z"\n' + METHOD)
    )
    assert policy.database == f"sqlite:///{tmp_path / 'x' / 'y.db'}"
    assert policy.folder == tmp_path / "z" and policy.model("m").if_audits_fail == "retrain"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (METHOD + "metod = 1", "models.m"), ("[models.m]\nkind = 'magic'", "models.m"),
        ("[models.M]\nkind='method'\nproblem='a:b'\nmethod='x'", "small letters"),
        ("[models.'../m']\nkind='method'\nproblem='a:b'\nmethod='x'", "small letters"),
        ("x = ", "not TOML"), ("file = 'x'", "no entry"), (METHOD + "retries = -1", "retries"),
        (METHOD + 'limits = { "a" = { gap = -1.0 } }', "gap"), ("[service]\nport = 1", "service.port"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, text, says):
    with pytest.raises(UserError, match=says) as caught:
        read_policy(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="--policy"):
        read_policy(tmp_path / "none.toml")


def test_databases(tmp_path):
    assert database_url("postgresql://u:p@h/d").startswith("postgresql+psycopg://u:p@h/d")
    assert database_url("postgres://h/d").startswith("postgresql+psycopg://")
    for wrong in ("mysql://h/d", "sqlite://", "sqlite:///:memory:", "://"):
        with pytest.raises(UserError):
            database_url(wrong)


@pytest.mark.parametrize(
    ("limit", "finding", "says"),
    [
        ({"low": 0.5}, {"value": 0.5}, None), ({"low": 0.5}, {"value": 0.49}, "below 0.5"),
        ({"high": 0.5}, {"value": 0.5}, None), ({"high": 0.5}, {"value": 0.51}, "above 0.5"),
        ({"gap": 0.1}, {"value": 0.4, "reference": 0.5}, None),
        ({"gap": 0.1}, {"value": 0.7, "reference": 0.5}, "farther"),
        ({"gap": 0.1}, {"value": 0.3, "reference": 0.5}, "farther"),  # two-sided
        ({"gap": 0.1}, {"value": 0.3, "reference": None}, "no reference"),
        ({"low": 0.1}, {"value": None, "reason": "too few"}, "too few"), ({"low": 0}, None, "not measured"),
        ({"low": 0.1}, {"value": float("nan")}, "below"), ({"gap": 1}, {"value": float("nan"), "reference": 0}, "farther"),
    ],
)  # fmt: skip
def test_limits(limit, finding, says):
    found = Limit(**limit).broken("x", finding)
    assert (found is None) if says is None else says in found


def test_a_retrained_model_is_not_held_against_its_like():
    far = {"value": 0.7, "reference": 0.5}
    assert Limit(gap=0.1).broken("x", far) and Limit(gap=0.1).broken("x", far, exact=True) is None
    assert Limit(gap=0.1, low=0.8).broken("x", far, exact=True)
    assert Limit(gap=0.1).broken("x", None, exact=True)  # it still has to be measured

"""Registries: names, dotted paths, suggestions."""

from __future__ import annotations

import fractions

import pytest

from expunge.core.errors import UserError
from expunge.core.registry import Registry


@pytest.fixture
def registry() -> Registry:
    table = {"fraction": "fractions:Fraction", "counter": "collections:Counter"}
    return Registry("thing", table, group="expunge.no-such-group")


def test_names_and_dotted_paths_resolve(registry):
    assert list(registry) == ["fraction", "counter"]
    assert registry.get("fraction") is fractions.Fraction
    assert registry.get("fractions.Fraction") is fractions.Fraction
    assert registry.by_class("Fraction") is fractions.Fraction
    assert registry.class_names() == ["Fraction", "Counter"]


def test_near_names_are_suggested(registry):
    with pytest.raises(UserError, match=r"no thing is called 'fracton'; did you mean fraction\?"):
        registry.get("fracton")
    with pytest.raises(UserError, match="there are fraction, counter"):
        registry.get("zzz")


@pytest.mark.parametrize("path", ["no.such.Thing", "fractions.Nothing", ".Thing", "..", "a..b"])
def test_paths_that_lead_nowhere_give_one_sentence(registry, path):
    with pytest.raises(UserError, match="cannot be imported"):
        registry.get(path)


def test_unknown_classes_are_attribute_errors(registry):
    with pytest.raises(AttributeError, match="no thing class is called 'Nothing'"):
        registry.by_class("Nothing")


def test_every_builtin_entry_can_be_imported():
    from expunge import methods, workloads

    for of in (methods.registry, workloads.registry):
        for name in of:
            assert of.get(name).name == name

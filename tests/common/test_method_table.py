"""Every method through every common check; adding a method adds a row by itself."""

from __future__ import annotations

import pytest

from expunge.methods import registry
from expunge.suite import checks
from expunge.suite.checks import METHOD_CHECKS


def method_of(name):
    cls = registry.get(name)
    return cls.create(checks.problem_for(cls.domain).tuned.get(name, {}))


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", list(registry))
def test_method(name, check):
    try:
        check(method_of(name))
    except checks._NotApplicable:
        assert (name, check.__name__) in NOT_APPLICABLE
    else:
        assert (name, check.__name__) not in NOT_APPLICABLE


# What cannot apply, row by row, so that nothing drops out of the table unnoticed.
NOT_APPLICABLE = {
    *(("modhifi-u", c) for c in ("frozen_stays_frozen", "resumes_to_the_same_bits")),
    # the recipe reads labels; a request that touched no step rightly changes nothing
    *(
        ("amnesiac-updates", c)
        for c in ("changes_weights", "reads_only_what_it_declares", "needs_what_it_declares")
    ),
    # with a frozen body it has nothing to train; tests/methods/test_laf.py freezes other parts
    ("laf", "frozen_stays_frozen"),
    ("concept-poison", "reads_only_what_it_declares"),
    *(("retrain", c) for c in ("frozen_stays_frozen", "reads_only_what_it_declares")),
    *(("retrain", c) for c in ("needs_what_it_declares", "resumes_to_the_same_bits")),
    *(("ssd", c) for c in ("frozen_stays_frozen", "resumes_to_the_same_bits")),
    *(
        (name, check)
        for name in ("influence", "fisher-forgetting", "iau")
        for check in ("frozen_stays_frozen", "resumes_to_the_same_bits")
    ),
    # their needs hold the recipe, which reads labels; tests/methods/test_dmm.py looks at the rest
    *(
        (name, check)
        for name in ("oracle-matching", "datamodel-matching", "dm-direct")
        for check in ("reads_only_what_it_declares", "needs_what_it_declares")
    ),
    *(("dm-direct", c) for c in ("frozen_stays_frozen", "resumes_to_the_same_bits")),
    *(("eco", c) for c in ("frozen_stays_frozen", "resumes_to_the_same_bits")),
    *(("guard", c) for c in ("frozen_stays_frozen", "resumes_to_the_same_bits")),
    # it trains adapters only
    ("o3", "frozen_stays_frozen"),
    # the last layer does not act on the states of a block
    ("rmu", "frozen_stays_frozen"),
    *((name, "reads_only_what_it_declares") for name in ("influence", "iau")),
    *(
        (name, "reads_only_what_it_declares")
        for name in ("gaussian-amnesiac", "neggrad-plus", "salun", "ssd")
    ),
    *((name, "reads_only_what_it_declares") for name in ("amnesiac", "guided-unlearning", "unsir")),
    # texts are their own labels
    *(
        (name, "reads_only_what_it_declares")
        for name in registry
        if registry.get(name).domain == "causal-lm"
    ),
}


def test_names_and_classes_agree():
    for name in registry:
        assert registry.get(name).name == name
        assert registry.by_class(registry.get(name).__name__) is registry.get(name)

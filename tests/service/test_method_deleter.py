"""Approximate deletion through the service: one method, then retraining where audits fail."""

from __future__ import annotations

import pytest
from stepping import step_until_done

import expunge as xp
from expunge.core.errors import UserError
from expunge.core.hashing import hash_model
from expunge.report.certificate import statement_of, verify
from expunge.report.keys import KeySet
from expunge.service.method_deleter import deleted
from expunge.service.service import Service

POLICY = """
[models.small]
kind = "method"
problem = "method_problem:problem"
method = "{method}"
settings = {{ {settings} }}
audits = ["accuracy"]
references = 1
limits = {{ {limits} }}
if_audits_fail = "{after}"
"""


@pytest.fixture
def opened(tmp_path):
    made = []

    def make(method="finetune", settings="epochs = 1, lr = 0.01", limits="", after="retrain"):
        (tmp_path / "service.toml").write_text(
            POLICY.format(method=method, settings=settings, limits=limits, after=after)
        )
        made.append(Service(tmp_path / "service.toml", patience=5))
        return made[-1]

    yield make
    for one in made:
        one.close()


def submit(service, **form):
    row = service.submit("small", xp.forget(**form))[0]
    step_until_done(service)
    return service.get(row["id"])


def test_a_second_deletion_goes_on_from_the_first(opened):
    service = opened()
    first = submit(service, ids=[1, 2, 3])
    one = service.current("small")
    second = submit(service, ids=[3, 4])  # 3 was deleted before
    two = service.current("small")
    assert [first["state"], second["state"]] == ["released"] * 2
    assert [one["version"], two["version"]] == [1, 2]
    assert two["record"]["weights_before"] == one["weights"] != two["weights"]
    folder = service.current_folder(two)
    assert deleted(folder) == [1, 2, 3, 4] and second["count"] == 1
    model = service.deleter("small").predictor(folder)
    assert hash_model(model) == two["weights"]
    assert service.deleter("small").verify(folder) == []


def test_the_certificate_says_no_more_than_the_evidence_shows(opened):
    service = opened()
    row = submit(service, label=1)
    verdict = verify(row["certificate"], KeySet.read(service.keys), service.current_folder(service.current("small")))  # fmt: skip
    assert verdict.ok, verdict.sentences
    predicate = statement_of(row["certificate"])["predicate"]
    assert predicate["class"] == "empirical" and predicate["method"]["name"] == "finetune"
    assert {"accuracy/forget-train", "accuracy/retain-test"} <= {
        f["name"] for f in predicate["findings"]
    }
    assert any("not run" in s for s in predicate["untested"]) and predicate["references"]
    names = [s["name"] for s in statement_of(row["certificate"])["subject"]]
    assert names == ["model.safetensors", "weights"]  # no hash of the list of who is forgotten


def test_audits_that_fail_end_in_a_retrained_model(opened):
    service = opened(limits='"accuracy/forget-train" = { gap = 0.2 }')
    row = submit(service, label=1)
    assert row["state"] == "released"
    current = service.current("small")
    assert current["record"]["how"] == "retrain" and current["record"]["method"] == "retrain"
    predicate = statement_of(row["certificate"])["predicate"]
    assert predicate["class"] == "exact"
    # never seen: the retrained model knows nothing of the class
    found = {f["name"]: f["value"] for f in predicate["findings"]}
    assert found["accuracy/forget-train"] < 0.2


def test_altered_weights_are_found(opened):
    service = opened()
    submit(service, ids=[1])
    folder = service.current_folder(service.current("small"))
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))
    assert "is not what" in service.deleter("small").verify(folder)[0]
    (folder / "deleted.json").unlink()
    assert service.deleter("small").verify(folder)


def test_what_does_not_fit_is_said_before_any_work(opened):
    with pytest.raises(UserError, match="no setting 'magic'"):
        opened(settings="magic = 1").deleter("small")
    with pytest.raises(UserError):
        opened(method="none").deleter("small")

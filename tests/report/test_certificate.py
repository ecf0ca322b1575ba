"""Certificates: form, words that follow from the class, and the drawings for people."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography")
from certificate_data import AFTER, FINDINGS, KINDS, evidence

from expunge.core.audit import Finding
from expunge.core.errors import UserError
from expunge.methods import registry
from expunge.report import certificate
from expunge.report.certificate_page import page, render_html, render_pdf
from expunge.report.classes import CLASSES, FORBIDDEN, check_words, evidence_class, markdown
from expunge.report.envelope import EnvelopeError, pae, seal
from expunge.report.explain import KNOWN
from expunge.report.keys import Key, KeySet
from expunge.report.statement import PAYLOAD, Evidence, Exact, finding_row, not_tested
from expunge.report.verdict import WORDS

KEY = Key.new()
TRUSTED = KeySet.of(KEY)
WEAKER = [k for k in KINDS if k != "exact"]


def test_pae_is_the_specifications_own_example():
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == expected
    assert pae("ü", b"") == b"DSSEv1 2 \xc3\xbc 0 "  # lengths count bytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_certificate_is_an_in_toto_statement_and_holds(kind):
    envelope = certificate.issue(evidence(kind), KEY, issued="2026-11-22T09:00:00.000+00:00")
    assert set(envelope) == {"payload", "payloadType", "signatures"}
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    content = json.loads(base64.b64decode(envelope["payload"]))
    assert set(content) == {"_type", "subject", "predicateType", "predicate"}
    assert content["_type"] == "https://in-toto.io/Statement/v1"
    assert {"name": "weights", "digest": {"expungeTensors": AFTER}} in content["subject"]
    predicate = content["predicate"]
    assert predicate["class"] == kind and predicate["title"] == CLASSES[kind].title
    assert predicate["issued"] == "2026-11-22T09:00:00.000+00:00"
    assert predicate["commitments"]["records"] == sorted(["ff" * 32, "00" * 32])
    assert len(predicate["findings"]) == len(FINDINGS)
    found = certificate.verify(json.loads(json.dumps(envelope)), TRUSTED)
    assert found.ok and found.faults == [] and found.statement == content
    assert any("not compared" in s for s in found.unchecked)


def test_an_exact_certificate_names_what_was_switched_off_and_the_hashes():
    content = certificate.statement_of(certificate.issue(evidence("exact"), KEY))
    exact = content["predicate"]["exact"]
    assert exact["switchedOff"][0] == {
        "shard": 1, "slices": [2], "adapters": ["shard1/0-2", "shard1/0-2-3"],
    }  # fmt: skip
    assert (exact["manifest"], exact["before"], exact["after"]) == ("5a" * 32, "cd" * 32, AFTER)
    said = " ".join(content["predicate"]["says"])
    assert "shard1/0-2, shard1/0-2-3 switched off" in said and "No longer in use: shard 2" in said


# ------------------------------------------------------------------ words


def readable(text: str) -> str:
    """What people see of a page."""
    body = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", body))


loud = st.lists(
    st.sampled_from([
        "removed", "Deleted", "erasure", "the data was REMOVED.", "deletion", "wiped", "fine",
        "memorised-fraction/erased", "0.5", "accuracy", "nothing is left",
    ]),
    max_size=4,
).map(" ".join)  # fmt: skip
finding = st.builds(
    Finding,
    st.sampled_from([*KNOWN, "audit-of-others/removed-share"]),
    st.none() | st.floats(0, 1),
    low=st.none() | st.floats(0, 0.4),
    high=st.none() | st.floats(0.6, 1),
    reference=st.none() | st.floats(0, 1),
    original=st.none() | st.floats(0, 1),
    reason=st.none() | loud,
)


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(WEAKER),
    method=st.sampled_from(list(registry)),
    findings=st.lists(finding, max_size=3),
    state=st.sampled_from(list(WORDS)),
    why=loud,
    untested=st.lists(loud, max_size=2),
    records=st.none() | st.integers(0, 10**6),
)
def test_no_text_of_a_weaker_class_says_removed(
    kind, method, findings, state, why, untested, records
):
    rows = [finding_row(f) for f in findings]
    made = evidence(
        kind, method={"name": method}, findings=rows, untested=[*not_tested(rows, []), *untested],
        verdict={"state": state, "sentence": why}, request={"form": "ids", "records": records},
    )  # fmt: skip
    envelope = certificate.issue(made, KEY)
    assert certificate.verify(envelope, TRUSTED).ok
    for text in (readable(render_html(envelope)), json.dumps(_without_names(page(envelope)))):
        assert FORBIDDEN.search(text) is None
    if state == "short" and rows:
        assert any("still tell the model from retrained" in s for s in page(envelope)["says"])


def _without_names(value):
    return {k: v for k, v in value.items() if k != "settings"}


@pytest.mark.parametrize("kind", WEAKER)
def test_the_table_itself_stays_within_its_class(kind):
    wording = CLASSES[kind]
    parts = [
        wording.title,
        wording.means,
        *wording.may_say,
        *wording.may_not_say,
        *wording.rests_on,
    ]
    assert not any(FORBIDDEN.search(p) for p in parts)
    assert wording.may_say and wording.may_not_say and wording.rests_on


def test_only_an_exact_one_says_removed():
    said = readable(render_html(certificate.issue(evidence("exact"), KEY)))
    assert "was removed from these weights" in said


@pytest.mark.parametrize(
    ("intent", "guarantee", "change", "kind"),
    [("removal", "exact", "weights", "exact"), ("removal", "certified", "weights", "certified"),
     ("removal", "empirical", "weights", "empirical"), ("suppression", "empirical", "weights", "suppression"),
     ("removal", "inference-time", "weights", "suppression"), ("removal", "exact", "wrapper", "suppression"),
     ("removal", "empirical", "adapter", "suppression"), ("suppression", "exact", "weights", "suppression")],
)  # fmt: skip
def test_the_weakest_of_method_and_change_decides(intent, guarantee, change, kind):
    assert evidence_class(intent, guarantee, change) == kind


def test_a_signed_certificate_with_other_words_is_refused():
    content = certificate.statement_of(certificate.issue(evidence(), KEY))
    content["predicate"]["says"].append("All records were removed.")
    envelope = seal(json.dumps(content).encode(), PAYLOAD, [KEY])
    faults = certificate.verify(envelope, TRUSTED).faults
    assert len(faults) == 2 and "not those of its evidence class" in faults[0]
    content["predicate"]["wording"] = 99  # words of a later version may differ, not claim more
    content["predicate"]["says"][-1] = "Nothing of them is left."
    envelope = seal(json.dumps(content).encode(), PAYLOAD, [KEY])
    found = certificate.verify(envelope, TRUSTED)
    assert found.ok and "words are of version 99" in found.unchecked[0]
    content["predicate"]["says"][-1] = "All records were removed."
    envelope = seal(json.dumps(content).encode(), PAYLOAD, [KEY])
    (fault,) = certificate.verify(envelope, TRUSTED).faults
    assert "says more than empirical evidence can show" in fault


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"subjects": []}, "no subject"),
        ({"subjects": [{"name": "x"}]}, "digest"),
        ({"method": {}}, "names the method"),
        ({"problem": "all users removed"}, "'removed'"),
        ({"kind": "proven"}, "no evidence class"),
        ({"kind": "certified", "bound": None}, "needs its bound"),
        ({"exact": Exact([], "", "", "00" * 32)}, "cannot be called empirical"),
        ({"kind": "exact", "exact": Exact([], "", "", "00" * 32)}, "not those that are released"),
        ({"packages": {"x": object()}}, "as JSON"),
        ({"problem": "\ud800"}, "no Unicode"),
    ],
)
def test_evidence_that_contradicts_itself_is_refused(more, says):
    with pytest.raises(UserError, match=re.escape(says)):
        certificate.issue(evidence(**more), KEY)


def test_check_words_names_the_word():
    with pytest.raises(UserError, match="cannot say 'Deleted'"):
        check_words("suppression", ["fine", "Deleted for good"])
    check_words("exact", ["Deleted for good"])
    check_words("empirical", ["code-eraser"])


def test_evidence_goes_through_a_file(tmp_path):
    from dataclasses import asdict

    path = tmp_path / "evidence.json"
    path.write_text(json.dumps(asdict(evidence("exact"))))
    read = Evidence.read(path)
    one, other = (certificate.statement_of(certificate.issue(e, KEY, issued="2026-11-22T09:00:00+00:00"))
                  for e in (read, evidence("exact")))  # fmt: skip
    one["predicate"].pop("id"), other["predicate"].pop("id")
    assert one == other
    path.write_text('{"colour": 1}')
    with pytest.raises(UserError, match="is no evidence"):
        Evidence.read(path)


# ------------------------------------------------------------------ predecessors


def test_a_certificate_follows_its_predecessor():
    first = certificate.issue(evidence(predecessor=None), KEY)
    second = certificate.issue(evidence(predecessor=certificate.fingerprint(first)), KEY)
    assert certificate.verify(second, TRUSTED, predecessor=first).ok
    other = certificate.issue(evidence(predecessor=None), KEY)
    assert "another one" in certificate.verify(second, TRUSTED, predecessor=other).faults[0]
    assert not certificate.verify(first, TRUSTED, predecessor=other).ok
    with pytest.raises(EnvelopeError):
        certificate.fingerprint({"payload": "!"})


# ------------------------------------------------------------------ drawings


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_shows_every_part_escaped(kind):
    envelope = certificate.issue(evidence(kind, problem="<script>alert(1)</script>"), KEY)
    text = render_html(envelope)
    assert "<script" not in text and "&lt;script&gt;" in text
    seen = readable(text)
    wording = CLASSES[kind]
    for part in (wording.title, *wording.may_say, *wording.may_not_say, *wording.rests_on, AFTER,
                 KEY.id, "9e" * 32, "77" * 32, "accuracy (forget, train)", "0.880 … 0.940",
                 "Audits that were not run", "no shadow models were trained"):  # fmt: skip
        assert part in seen, part
    assert ("5a" * 32 in seen) == (kind == "exact")


def test_no_audit_and_no_reference_are_said():
    made = evidence(findings=[], verdict=None, untested=[], references=[])
    seen = readable(render_html(certificate.issue(made, KEY)))
    assert seen.count("No audit was run.") == 2 and "found no more traces" not in seen
    made = evidence(references=[])
    assert "No retrained model stands beside" in readable(render_html(certificate.issue(made, KEY)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_pdf_is_set_from_data_not_commands(kind):
    pytest.importorskip("typst")
    envelope = certificate.issue(evidence(kind, problem='#panic("x") *a* $1$ \\ "'), KEY)
    data = render_pdf(envelope)
    assert (
        data.startswith(b"%PDF-") and data.count(b"/Type /Page\n") + data.count(b"/Type/Page") >= 1
    )


def test_the_guide_prints_the_table_of_the_code():
    guide = Path(__file__).parents[2] / "docs" / "certificates.md"
    assert markdown() in guide.read_text()

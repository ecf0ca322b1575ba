"""A certificate for people: one self-contained HTML page, and a PDF (extra `pdf`).

Both are drawn from `page`, which takes every word from the signed statement and adds only
headings. What counts is the signed JSON; the page says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, Literal

from expunge.core.errors import ExpungeError, UserError
from expunge.report.certificate import fingerprint, statement_of
from expunge.report.statement import TENSORS
from expunge.report.table import number
from expunge.report.verdict import MARKS, WORDS

NAMES = {"sha256": "SHA-256 of the file", TENSORS: "SHA-256 over tensors"}
SHOWN = 40
"""Files that are listed; a folder of more is named by their number and the rest of the JSON."""
ORIGIN = (
    "This page was drawn from a signed file. The file counts, not the page: check it with "
    "expunge certificate verify FILE --keys KEYS --weights RELEASED."
)


def page(envelope: Any) -> dict[str, Any]:
    """Everything that is shown, as JSON types.

    Args:
        envelope: of a certificate; its signature is not looked at here.

    Returns:
        Title, class, sentences, facts, lists and tables in the order in which they are shown.

    Raises:
        EnvelopeError: it is no certificate.
    """
    content = statement_of(envelope)
    predicate = content["predicate"]
    return {
        "title": predicate["title"],
        "kind": predicate["class"],
        "says": predicate["says"],
        "facts": list(_facts(predicate, envelope)),
        "lists": [
            {"title": "What may be said with it", "style": "may", "items": predicate["maySay"]},
            {"title": "What may not be said", "style": "not", "items": predicate["mayNotSay"]},
            {"title": "What it rests on", "style": "rests", "items": predicate["restsOn"]},
        ],
        "subjects": _subjects(content["subject"]),
        "exact": _exact(predicate.get("exact")),
        "bound": _pairs(predicate.get("bound") or {}),
        "findings": [_finding(f) for f in predicate["findings"]],
        "references": len(predicate["references"]),
        "untested": predicate["untested"],
        "settings": _pairs(predicate["method"].get("settings") or {}),
        "origins": list(_origins(predicate, envelope)),
        "packages": _pairs(predicate["packages"]),
        "foot": ORIGIN,
    }


def render_html(envelope: Any) -> str:
    """One page without script and network, in the style of the reports.

    Raises:
        EnvelopeError: it is no certificate.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("expunge.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("certificate.html").render(**page(envelope))


def render_pdf(envelope: Any) -> bytes:
    """The same as a PDF of A4 pages.

    Raises:
        EnvelopeError: it is no certificate.
        UserError: typst is not installed.
        ExpungeError: it could not be set.
    """
    return _typeset(envelope, "pdf")[0]


def _typeset(envelope: Any, form: Literal["pdf", "png"]) -> list[bytes]:
    try:
        import typst
    except ImportError as error:
        raise UserError("a PDF needs the extra pdf: pip install 'expunge[pdf]'") from error
    template = files("expunge.report").joinpath("templates/certificate.typ").read_bytes()
    # the content goes in as data, so that nothing in it can be taken for a command
    inputs = {"page": json.dumps(page(envelope))}
    try:
        made = typst.Compiler(template, ignore_system_fonts=True, sys_inputs=inputs).compile(
            format=form
        )
    except RuntimeError as error:
        raise ExpungeError(f"the PDF could not be set: {error}") from error
    return list(made) if isinstance(made, list) else [made or b""]


def _facts(predicate: Mapping[str, Any], envelope: Any) -> Iterator[dict[str, Any]]:
    request, method = predicate["request"], predicate["method"]
    listed = [
        ("issued", predicate["issued"], False),
        ("evidence", predicate["class"], False),
        ("model", predicate["problem"], False),
        ("request", request.get("id"), True),
        ("received", request.get("received"), False),
        ("records", request.get("records"), False),
        ("method", method["name"], True),
        ("seed", method.get("seed"), False),
        ("certificate", predicate["id"], True),
    ]
    for label, value, code in listed:
        if value not in (None, ""):
            yield {"label": label, "value": str(value), "code": code}


def _origins(predicate: Mapping[str, Any], envelope: Any) -> Iterator[dict[str, Any]]:
    head, committed = predicate["ledger"], predicate["commitments"]["records"]
    signed = ", ".join(s["keyid"] for s in envelope["signatures"])
    yield {"label": "signed with the key", "value": signed, "code": True}
    yield {"label": "SHA-256 of what is signed", "value": fingerprint(envelope), "code": True}
    if head is not None:
        value = f"row {head['seq']}, {head['hash']}"
        yield {"label": "ledger when it was issued", "value": value, "code": True}
    if predicate["predecessor"] is not None:
        yield {"label": "follows the certificate", "value": predicate["predecessor"], "code": True}
    if committed:
        value = f"{len(committed)} salted commitments to record ids, in the signed file"
        yield {"label": "records", "value": value, "code": False}
    for what, run in predicate["runs"].items():
        yield {"label": f"run, {what}", "value": str(run), "code": True}
    if link := predicate["method"].get("link"):
        yield {"label": "method described at", "value": str(link), "code": False}


def _subjects(subjects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # the hash over all tensors first: it is what other parts of the page speak of
    ordered = sorted(subjects, key=lambda s: s["name"] != "weights")
    shown = [
        {"name": s["name"], "digest": digest, "how": NAMES.get(how, how)}
        for s in ordered[:SHOWN]
        for how, digest in s["digest"].items()
    ]
    return {"rows": shown, "more": max(0, len(subjects) - SHOWN)}


def _exact(exact: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not exact:
        return None
    rows = [
        {
            "shard": str(step.get("shard")),
            "slices": ", ".join(str(s) for s in step.get("slices") or []) or "–",
            "adapters": ", ".join(str(a) for a in step.get("adapters") or []) or "none",
        }
        for step in exact["switchedOff"]
    ]
    hashes = [
        {"label": "manifest", "value": exact["manifest"], "code": True},
        {"label": "weights before", "value": exact["before"], "code": True},
        {"label": "weights after", "value": exact["after"], "code": True},
    ]
    if exact.get("collateral") is not None:
        value = f"{exact['collateral']} samples, until the shard is trained anew"
        hashes.append({"label": "also out of use", "value": value, "code": False})
    return {"rows": rows, "hashes": hashes}


def _finding(row: Mapping[str, Any]) -> dict[str, str]:
    low, high = row.get("low"), row.get("high")
    name, state = str(row["name"]), str(row.get("state") or "unjudged")
    return {
        "label": str(row["label"]),
        "value": number(row.get("value"), name),
        "interval": "–"
        if low is None or high is None
        else f"{number(low, name)} … {number(high, name)}",
        "reference": number(row.get("reference"), name),
        "state": state if state in MARKS else "unjudged",
        "mark": MARKS.get(state, MARKS["unjudged"]),
        "word": WORDS.get(state, WORDS["unjudged"]),
        "reading": str(row.get("reading") or row.get("reason") or ""),
    }


def _pairs(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"label": str(k), "value": v if isinstance(v, str) else json.dumps(v, ensure_ascii=False), "code": True}
        for k, v in values.items()
    ]  # fmt: skip

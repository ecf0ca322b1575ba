"""A certificate as JSON, as a page and as a PDF: which of them a call asks for, and how it is answered."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import Response

from expunge.core.errors import UserError
from expunge.report.certificate import text
from expunge.report.certificate_page import render_html, render_pdf
from expunge.service.errors import NotAcceptable

Form = Literal["json", "html", "pdf"]
TYPES: Mapping[str, Form] = {
    "application/json": "json", "text/html": "html", "application/pdf": "pdf",
}  # fmt: skip
"""Media types in order of preference where a call takes several alike."""
CONTENT: dict[str, Any] = {
    "application/json": {"schema": {"type": "object"}},
    "text/html": {"schema": {"type": "string"}},
    "application/pdf": {"schema": {"type": "string", "format": "binary"}},
}
"""The three forms in the OpenAPI document."""
HEADERS = {"X-Content-Type-Options": "nosniff", "Vary": "Accept"}
# the page has neither scripts nor anything from elsewhere, whatever a certificate may say
CLOSED = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox"
)
# a browser's own viewer of PDFs is a page with scripts and styles, which that would block
OPEN = "frame-ancestors 'none'"


def asked_for(accept: str | None) -> Form:
    """The form that an `Accept` header weighs highest; JSON where it names none of the three."""
    best, form = 0.0, "json"
    for kind, name in TYPES.items():
        weight = _weight(accept or "*/*", kind)
        if weight > best:
            best, form = weight, name
    return form  # type: ignore[return-value]


def _weight(accept: str, kind: str) -> float:
    """What the most specific entry for a media type gives it."""
    found = (0, 0.0)
    for entry in accept.lower().split(",")[:100]:
        name, *parameters = (part.strip() for part in entry.split(";"))
        if name not in (kind, kind.partition("/")[0] + "/*", "*/*"):
            continue
        given = next((p.partition("=")[2] for p in parameters if p.startswith("q=")), "1")
        try:
            weight = min(max(float(given), 0.0), 1.0)
        except ValueError:
            weight = 0.0
        found = max(found, (3 - name.count("*"), weight))
    return found[1]


def answer(signed: Mapping[str, Any], identifier: str, form: Form) -> Response:
    """A certificate in one form.

    Args:
        signed: its envelope.
        identifier: of the request, for the file's name.
        form: as what; the JSON is byte for byte the file that is verified.

    Raises:
        NotAcceptable: a PDF is asked for, and this service cannot make one.
    """
    whole = text(signed)
    if form == "json":
        content, shown = whole.encode(), "attachment"
    else:
        content, shown = _drawn(whole, form), "inline"
    name = f'{shown}; filename="certificate-{identifier}.{form}"'
    kind = next(k for k, v in TYPES.items() if v == form)
    closed = {"Content-Security-Policy": OPEN if form == "pdf" else CLOSED}
    return Response(
        content, media_type=kind, headers={**HEADERS, **closed, "Content-Disposition": name}
    )


@functools.lru_cache(maxsize=64)
def _drawn(whole: str, form: Form) -> bytes:
    """A page or a PDF, which takes a moment to set and is the same each time."""
    signed = json.loads(whole)
    if form == "html":
        return render_html(signed).encode()
    try:
        return render_pdf(signed)
    except UserError as error:
        raise NotAcceptable(f"{error}; ask for text/html or application/json") from error

"""`expunge certificate`: issue and verify certificates, draw them for people, keep the keys."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.common import Json, StoreOption, print_json, print_table

if TYPE_CHECKING:
    from expunge.report.keys import Keys
    from expunge.report.statement import Evidence
    from expunge.service.ledger import Head

app = typer.Typer(help="Issue and verify certificates; keep the keys that sign them.", no_args_is_help=True)  # fmt: skip
key = typer.Typer(help="Keys that sign certificates.", no_args_is_help=True)
app.add_typer(key, name="key")

KeysOption = Annotated[
    str | None,
    typer.Option("--keys", help="Folder with keys, or a keys.json; $EXPUNGE_KEYS or .expunge/keys by default."),
]  # fmt: skip
File = Annotated[Path, typer.Argument(metavar="FILE", help="A certificate's JSON file.")]
LedgerOption = Annotated[
    str | None, typer.Option("--ledger", help="An exported ledger, or the URL or SQLite file of its database.")
]  # fmt: skip


@app.command()
def issue(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="An unlearning run of the store, or a file with evidence (.json)."
        ),
    ],
    out: Annotated[str, typer.Option("--out", help="Folder for the certificate.")] = "certificate",
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="File or folder that is released; its files are named."),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option("--ids", help="File with record ids, one a line, to commit to with a salt."),
    ] = None,
    ledger: LedgerOption = None,
    predecessor: Annotated[
        str | None, typer.Option("--predecessor", help="Certificate of the model before.")
    ] = None,
    pdf: Annotated[bool, typer.Option("--pdf", help="Draw a PDF too (extra pdf).")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    keys: KeysOption = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Sign what a run did and what its audits found: certificate.json and a page for people."""
    from expunge.core.errors import UserError
    from expunge.report import certificate
    from expunge.report.certificate_page import render_html, render_pdf

    folder = Path(out)
    wanted = ["certificate.json", "certificate.html", *(["certificate.pdf"] if pdf else [])]
    there = [n for n in wanted if (folder / n).exists()]
    if there and not force:
        raise UserError(f"{folder / there[0]} exists; pass --force to replace it")
    signer = _keys(keys).signer()
    more: dict[str, Any] = {}
    if ledger is not None:
        more["ledger"] = vars(_head(ledger))
    if predecessor is not None:
        more["predecessor"] = certificate.fingerprint(certificate.read(predecessor))
    evidence, salt = _evidence(run, weights, ids, store, more)
    envelope = certificate.issue(evidence, signer)
    files: dict[str, bytes] = {
        "certificate.json": certificate.text(envelope).encode(),
        "certificate.html": render_html(envelope).encode(),
    }
    if pdf:
        files["certificate.pdf"] = render_pdf(envelope)
    _write(folder, files, salt)
    if as_json:
        print_json({
            "folder": str(folder), "class": evidence.kind, "files": sorted(files),
            "salt": "certificate.salt" if salt else None, "key": signer.id,
            "sha256": certificate.fingerprint(envelope),
        })  # fmt: skip
        return
    for sentence in certificate.statement_of(envelope)["predicate"]["says"]:
        typer.echo(sentence)
    for name in files:
        typer.echo(f"wrote {folder / name}")
    if salt:
        typer.echo(
            f"wrote {folder / 'certificate.salt'}: who has it can test ids against the certificate; "
            "keep it apart, or destroy it"
        )


@app.command()
def verify(
    file: File,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="File or folder to compare with what was released."),
    ] = None,
    ledger: LedgerOption = None,
    predecessor: Annotated[
        str | None, typer.Option("--predecessor", help="Certificate that it says it follows.")
    ] = None,
    keys: KeysOption = None,
    as_json: Json = False,
) -> None:
    """Check a certificate offline; exit 0 if it holds, 1 if not, 2 if it could not be checked."""
    from expunge.report import certificate
    from expunge.report.envelope import EnvelopeError
    from expunge.report.keys import KeySet

    trusted = KeySet.read(_place(keys))
    try:
        envelope = certificate.read(file)
        before = None if predecessor is None else certificate.read(predecessor)
        found = certificate.verify(envelope, trusted, weights, predecessor=before)
    except EnvelopeError as error:
        found = certificate.Verdict(False, [str(error)])
    faults = [f.replace("the certificate", file.name, 1) for f in found.faults]
    checked, unchecked = list(found.checked), list(found.unchecked)
    if ledger is not None:
        faults += _against(ledger, found.statement, checked, unchecked)
    predicate = (found.statement or {}).get("predicate") or {}
    if as_json:
        print_json({
            "ok": not faults, "faults": faults, "checked": checked, "unchecked": unchecked,
            "class": predicate.get("class"), "says": predicate.get("says") or [],
        })  # fmt: skip
    else:
        for word, sentences in (
            ("wrong", faults),
            ("right", checked),
            ("not looked at", unchecked),
        ):
            for sentence in sentences:
                typer.echo(f"{word}: {sentence}")
        typer.echo(
            "the certificate is refused"
            if faults
            else f"the certificate holds: {predicate['title']}"
        )
    if faults:
        raise typer.Exit(1)


@app.command()
def show(
    file: File,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page for people.")] = None,
    pdf: Annotated[Path | None, typer.Option("--pdf", help="Write a PDF (extra pdf).")] = None,
    as_json: Json = False,
) -> None:
    """Say what a certificate states, without checking it; draw it again."""
    from expunge.report import certificate
    from expunge.report.certificate_page import render_html, render_pdf

    envelope = certificate.read(file)
    statement = certificate.statement_of(envelope)
    if html is not None:
        html.write_text(render_html(envelope), encoding="utf-8")
    if pdf is not None:
        pdf.write_bytes(render_pdf(envelope))
    if as_json:
        print_json(statement)
        return
    predicate = statement["predicate"]
    for line in (predicate["title"], *predicate["says"]):
        typer.echo(line)
    ordered = sorted(statement["subject"], key=lambda s: s["name"] != "weights")
    rows = [(s["name"], how, digest) for s in ordered for how, digest in s["digest"].items()]
    shown = rows if len(rows) <= 6 else rows[:1]
    print_table("released", ("name", "hash", "value"), shown)
    if len(rows) > len(shown):
        typer.echo(f"and {len(rows) - len(shown)} files; --json names them")


@key.command()
def create(
    name: Annotated[str, typer.Option("--name", help="Whose key it is, for people.")] = "",
    keys: KeysOption = None,
    as_json: Json = False,
) -> None:
    """Make the first key; nothing that is there is replaced."""
    _say(vars(_keys(keys).create(name)), as_json, "made key")


@key.command()
def rotate(
    name: Annotated[
        str, typer.Option("--name", help="Whose key it is; that of the old one by default.")
    ] = "",
    keys: KeysOption = None,
    as_json: Json = False,
) -> None:
    """Make a new key; the old one signs no more, and what it signed stays valid."""
    _say(vars(_keys(keys).rotate(name)), as_json, "made key")


@key.command()
def revoke(
    which: Annotated[
        str, typer.Argument(metavar="KEY", help="Id of a key, or the beginning of it.")
    ],
    reason: Annotated[str, typer.Option("--reason", help="Why, for those who verify.")] = "",
    keys: KeysOption = None,
    as_json: Json = False,
) -> None:
    """Take all trust from a key, also for what it signed before."""
    _say(vars(_keys(keys).revoke(which, reason)), as_json, "revoked key")


@key.command("list")
def list_keys(keys: KeysOption = None, as_json: Json = False) -> None:
    """List the public keys with the times in which each may sign."""
    from expunge.report.keys import KeySet

    listed = [vars(k) for k in KeySet.read(_place(keys)).keys]
    if as_json:
        print_json(listed)
        return
    columns = ("id", "name", "since", "until", "revoked", "reason")
    print_table("keys", columns, [[k[c] or "–" for c in columns] for k in listed])


@key.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the public keys.")],
    keys: KeysOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write the public keys for those who verify; no private key is in it."""
    from expunge.core.errors import UserError
    from expunge.report.keys import KeySet

    if file.exists() and not force:
        raise UserError(f"{file} exists; pass --force to replace it")
    KeySet.read(_place(keys)).write(file)
    typer.echo(f"wrote {file}")


def _place(keys: str | None) -> Path:
    return Path(keys or os.environ.get("EXPUNGE_KEYS") or ".expunge/keys").expanduser()


def _keys(keys: str | None) -> Keys:
    from expunge.core.errors import UserError
    from expunge.report.keys import Keys

    if (place := _place(keys)).is_file():
        raise UserError(f"{place} is a file; private keys lie in a folder")
    return Keys(place)


def _evidence(
    run: str, weights: str | None, ids: str | None, store: str | None, more: Mapping[str, Any]
) -> tuple[Evidence, str | None]:
    """Evidence of a run or a file, and the salt of the commitments in it, if there are any."""
    from dataclasses import replace

    from expunge.core.request import Request
    from expunge.report.artefact import describe
    from expunge.report.statement import Evidence
    from expunge.report.stored_evidence import committed, evidence_of
    from expunge.store import Store

    named: Sequence[int | str] = []
    if run.endswith(".json"):
        evidence = replace(Evidence.read(run), **more)
        if weights is not None:
            evidence = replace(evidence, subjects=describe(weights))
    else:
        opened = Store.open(store)
        entry = opened.get(run)
        evidence = evidence_of(opened, entry, weights, **more)
        named = Request.from_dict(entry.record["request"]).ids or ()
    if ids is not None:
        named = [line.strip() for line in _lines(ids) if line.strip()]
    if not named:
        return evidence, None
    salt, commitments = committed(named)
    return replace(evidence, commitments=commitments), salt


def _lines(file: str) -> list[str]:
    from expunge.core.errors import UserError

    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the ids in {file} ({error})") from error


def _head(where: str) -> Head:
    """The end of a ledger that was checked.

    Raises:
        UserError: something is wrong with it.
    """
    from expunge.core.errors import UserError
    from expunge.service import ledger, ledger_check

    place = ledger.locate(where)
    if faults := ledger.verify(place):
        raise UserError(f"the ledger does not hold, so no certificate names it: {faults[0]}")
    if isinstance(place, Path):
        last = ledger_check.read_export(place)[-1:]
        return ledger.Head(last[0].seq, last[0].hash) if last else ledger.Head(0, ledger.ZERO)
    with place.connect() as connection:
        return ledger.head(connection)


def _against(
    where: str, statement: Mapping[str, Any] | None, checked: list[str], unchecked: list[str]
) -> list[str]:
    from expunge.service import ledger

    head = ((statement or {}).get("predicate") or {}).get("ledger")
    named = [] if head is None else [ledger.Head(head["seq"], head["hash"])]
    faults = ledger.verify(ledger.locate(where), named=named)
    unchecked[:] = [s for s in unchecked if not s.startswith("the ledger was not compared")]
    if not faults:
        which = f", and row {head['seq']} is the one named" if head is not None else ""
        checked.append(f"the ledger {where} holds{which}")
    return faults


def _write(folder: Path, files: Mapping[str, bytes], salt: str | None) -> None:
    from expunge.core.errors import ExpungeError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if salt:
            place = folder / "certificate.salt"
            place.unlink(missing_ok=True)
            with os.fdopen(
                os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w"
            ) as file:
                file.write(json.dumps({"salt": salt}) + "\n")
        for name, data in files.items():
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            temporary.write_bytes(data)
            temporary.replace(folder / name)
    except OSError as error:
        raise ExpungeError(f"cannot write to {folder}: {error.strerror or error}") from error


def _say(values: Mapping[str, Any], as_json: bool, what: str) -> None:
    if as_json:
        print_json(values)
    else:
        typer.echo(f"{what} {values['id']}")

"""Steps of the workflows; each reads what it needs anew and gives the same when it is run again."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import sqlalchemy as sa

from expunge.core.errors import ExpungeError, RequestError
from expunge.core.request import Request
from expunge.report.verdict import row_verdict
from expunge.service import batches, requests, states, versions
from expunge.service.certify import (
    CannotSign,
    about_others,
    certificates,
    first_fingerprint,
    signer,
)
from expunge.service.deleter import Json, Resolved
from expunge.service.logs import logger
from expunge.service.service import Service
from expunge.service.tables import samples


def resolve(service: Service, identifier: str) -> bool | None:
    """Find what a request covers; answer at once if there is nothing to do or nothing that can be done.

    Returns:
        Whether it goes on to be planned; None if it waits for a key that signs its answer.
    """
    row = service.get(identifier)
    if row["state"] != states.RECEIVED:
        return bool(row["state"] == states.RESOLVED)
    asked = service.database.read(lambda c: requests.selector_of(c, identifier))
    model, current = service.policy.model(row["model"]), service.current(row["model"])
    try:
        found = service.deleter(row["model"]).resolve(asked, service.current_folder(current))
        if (why := in_vain(found)) and (
            model.unknown == "reject" or not (found.ids or found.already)
        ):
            raise RequestError(why)
        if found.ids and not found.left:
            raise RequestError("it covers all the data that is left; nothing would be kept")
    except RequestError as error:
        why = without_selector(str(error), asked)
        service.database.write(
            lambda c: requests.move(
                c, identifier, states.RECEIVED, states.REJECTED, {"why": why}, error=why
            )
        )
        return False
    note = {
        "samples": len(found.ids), "already": len(found.already), "unknown": len(found.unknown),
        "outside": len(found.outside),
    }  # fmt: skip
    signed: Json = {}
    if not found.ids:
        record = dict(current["record"]) if current is not None else _untouched(service, row)
        folder, before = _in_force(service, row["model"], current), _before(service, current)
        covered = {identifier: list(found.already)}
        try:
            signed = certificates(
                service, row["model"], covered, record, folder, before, earlier=True
            )
        except CannotSign as error:
            _waits(service, str(error), lambda c: [identifier])
            return None

    def write(connection: sa.Connection) -> None:
        if not requests.move(
            connection,
            identifier,
            states.RECEIVED,
            states.RESOLVED,
            note,
            count=len(found.ids),
            error=None,
        ):
            return
        if found.ids:
            # those deleted before too: the certificate commits to all that it covers
            every = sorted({*found.ids, *found.already})
            connection.execute(sa.insert(samples), {"request": identifier, "ids": every})
            return
        result = {"outcome": "already-deleted", "version": current["version"] if current else 0}
        requests.move(
            connection, identifier, states.RESOLVED, states.RELEASED, result,
            result=result, certificate=signed.get(identifier),
        )  # fmt: skip

    service.database.write(write)
    return bool(service.get(identifier)["state"] == states.RESOLVED)


def _untouched(service: Service, row: requests.Row) -> Json:
    """A record of weights that the service never changed."""
    deleter = service.deleter(row["model"])
    weights = deleter.weights(None)
    return {
        "weights": weights, "weights_before": weights, "findings": [],
        "evidence": deleter.evidence, "method": "an earlier deletion",
    }  # fmt: skip


def _in_force(service: Service, model: str, current: requests.Row | None) -> Path | None:
    """The folder whose files a certificate names; None for a model that was not trained into one."""
    if current is not None:
        return service.current_folder(current)
    origin: Path | None = getattr(service.deleter(model), "origin", None)
    return origin


def _waits(service: Service, why: str, which: Callable[[sa.Connection], Iterable[str]]) -> None:
    """Say with requests that they wait for a key; nothing else of them changes."""
    service.database.write(lambda c: requests.say(c, which(c), why))


def _before(service: Service, current: requests.Row | None) -> requests.Row | None:
    """The version before the one in force, which its certificates name."""
    if current is None or current["version"] < 2:
        return None
    return service.database.read(
        lambda c: batches.version(c, current["model"], current["version"] - 1)
    )


def in_vain(found: Resolved) -> str:
    """A sentence on what a request names that the model was not trained on; empty if there is nothing."""
    named = len(found.ids) + len(found.already) + len(found.unknown) + len(found.outside)
    said = []
    if found.unknown:
        said.append(f"{len(found.unknown)} of the {named} samples it names are unknown")
    if found.outside:
        said.append(
            f"{len(found.outside)} of the {named} samples it names are in the data, but the model "
            "was not trained on them"
        )
    return "; ".join(said)


def without_selector(text: str, asked: Request) -> str:
    """A sentence without what a request names; it goes where nothing personal may go."""
    named = [str(v) for v in (*(asked.ids or ()), *(asked.texts or ()), *(asked.user or ()))]
    if (
        asked.where is not None
    ):  # names of columns are quoted from it too, and anything may stand there
        words = re.findall(r"[^\W_][\w.@+-]*", asked.where)
        named += [asked.where, *(w for w in words if w not in ("and", "or", "not", "in", "id", "label", "y"))]  # fmt: skip
    for value in sorted({v for v in named if v}, key=len, reverse=True):
        text = text.replace(repr(value), "…")
        if len(value) > 2:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "…", text)
    return text


def without_samples(text: str, ids: Iterable[int]) -> str:
    """A sentence of somebody else's error without the numbers of samples."""
    named = {str(i) for i in ids}
    return re.sub(r"\d+", lambda found: "…" if found[0] in named else found[0], text)


def plan(service: Service, identifier: str) -> bool:
    """Price a deletion; start a batch unless the request waits for approval."""
    row = service.get(identifier)
    if row["state"] != states.RESOLVED:
        return False
    name, model = row["model"], service.policy.model(row["model"])
    ids = service.database.read(lambda c: batches.ids_of(c, [identifier]))
    folder, deleter = service.current_folder(service.current(name)), service.deleter(name)
    new = deleter.resolve(Request(ids=tuple(ids)), folder).ids
    priced = deleter.plan(new, folder)
    since = dt.datetime.now(dt.UTC) - dt.timedelta(hours=model.hold_hours)

    def write(connection: sa.Connection) -> None:
        requests.lock_model(connection, name)
        # a large request is not to pass in small parts
        recent = requests.unheld(connection, name, since.isoformat(timespec="milliseconds"))
        hold, alone = model.holds(row["count"], recent), model.holds(row["count"])
        note = {"hold": hold, **({"recent": recent} if hold and not alone else {})}
        moved = requests.move(
            connection, identifier, states.RESOLVED, states.PLANNED, note, plan=priced, hold=hold
        )
        if moved and not hold:
            requests.ensure_batch(connection, name, service.enqueue, model.batch_seconds)

    service.database.write(write)
    return True


def fail_request(service: Service, identifier: str, why: str) -> None:
    """End a request that could not be planned."""
    before = (states.RECEIVED, states.RESOLVED)
    if service.get(identifier)["state"] in before:
        asked = service.database.read(lambda c: requests.selector_of(c, identifier))
        ids = service.database.read(lambda c: batches.ids_of(c, [identifier]))
        why = without_samples(without_selector(why, asked), ids)
    logger().error("request failed", request=identifier, why=why)
    service.database.write(
        lambda c: requests.move(c, identifier, before, states.FAILED, {"why": why}, error=why)
    )


def claim(service: Service, batch: str) -> Json:
    """Take all requests of a model that are ready; sets `model`, `requests`, `retries`.

    While no key can sign, none is taken, so that they can still be withdrawn; sets `waits`.
    """
    try:
        signer(service.keys)
    except CannotSign as error:
        _waits(service, str(error), lambda c: batches.ready(c, batch))
        return {"waits": True}

    def write(connection: sa.Connection) -> Json:
        name = batches.model_of(connection, batch)
        most = service.policy.model(name).batch_requests
        held = batches.claim(connection, batch, service.enqueue, most)
        return {"model": name, "requests": held}

    done = service.database.write(write)
    return {**done, "retries": service.policy.model(done["model"]).retries}


def forget(service: Service, batch: str, how: str) -> Json:
    """Delete what the requests of a batch cover, once, into a version of its own.

    Returns:
        `folder` of the version, or None if nothing was left to delete; `base`, the version it was made
        from; and the deletion's record.
    """
    name, _, ids = service.database.read(lambda c: batches.contents(c, batch))
    parent, folder = service.versions(name), f"{batch}-{how}"
    if (record := versions.read(parent / folder)) is not None:
        return record
    current, deleter = service.current(name), service.deleter(name)
    before = service.current_folder(current)
    found = deleter.resolve(Request(ids=tuple(ids)), before)
    if found.unknown:
        raise ExpungeError("samples that were there when the request was planned are gone")
    base = 0 if current is None else int(current["version"])
    if not found.ids:
        weights = deleter.weights(before)
        return {"folder": None, "base": base, "weights": weights, "weights_before": weights}
    if not found.left:
        raise ExpungeError("the requests cover all the data that is left; nothing would be kept")
    return versions.make(
        parent, folder,
        lambda target: {
            **deleter.forget(found.ids, before, target, how),
            "folder": folder, "base": base, "samples": len(found.ids), "how": how,
        },
    )  # fmt: skip


def audit(service: Service, batch: str, how: str) -> Json:
    """Measure what was written, and hold it against the policy's limits.

    Returns:
        `findings`, `broken` (sentences) and whether the policy escalates to retraining.
    """
    name, _, ids = service.database.read(lambda c: batches.contents(c, batch))
    model, version = service.policy.model(name), service.versions(name) / f"{batch}-{how}"
    made = versions.read(version)
    deleter, before = service.deleter(name), service.current_folder(service.current(name))
    # a batch may hold samples that were deleted before it began
    asked = deleter.resolve(Request(ids=tuple(ids)), before)
    if made is None:
        if asked.ids:  # no audit can pass on what is not there
            raise ExpungeError(f"the version {version.name} is not there any more")
        return {"findings": [], "broken": [], "more": {}, "verdict": None, "escalate": False}
    wrong = deleter.verify(version)
    if wrong:
        raise ExpungeError(f"what was written is not whole: {wrong[0]}")
    gone = set(asked.already)
    findings, more = deleter.audit([i for i in ids if i not in gone], before, version, how)
    exact = how == "retrain" and made["evidence"] == "exact"
    return {
        "findings": findings, "broken": model.broken(findings, exact=exact), "more": more,
        "verdict": verdict(findings, made),
        "escalate": getattr(model, "if_audits_fail", "reject") == "retrain",
    }  # fmt: skip


def verdict(findings: list[Json], made: Json) -> Json | None:
    """What findings say together, with no more words than the method's guarantee allows."""
    if not findings:
        return None
    row = {"findings": {f["name"]: f for f in findings}, "method": made.get("method"),
           "intent": made.get("intent"), "guarantee": made.get("guarantee")}  # fmt: skip
    found = row_verdict(row)
    return {"state": found.state, "sentence": found.sentence}


def escalate(service: Service, batch: str, found: Json) -> None:
    """Note that audits failed and that the model is retrained."""

    def write(connection: sa.Connection) -> None:
        held = batches.members(connection, batch)
        if requests.noted(connection, held, "escalated"):
            return
        note = {"passed": False, "broken": found["broken"]}
        requests.move(connection, held, states.RUNNING, states.AUDITED, note)
        requests.move(connection, held, states.AUDITED, states.RUNNING, {"escalated": "retrain"})

    service.database.write(write)


def release(service: Service, batch: str, how: str, made: Json, found: Json) -> Json:
    """Put the version into force and release all requests with their certificates, in one transaction.

    While no key can sign, the old version stays in force; sets `waits` then.
    """
    name, held, _ = service.database.read(lambda c: batches.contents(c, batch))
    covered = service.database.read(lambda c: batches.ids_by_request(c, held))
    record = {k: v for k, v in made.items() if k not in ("folder", "base")}
    record |= {
        "batch": batch,
        "findings": found["findings"],
        "verdict": found["verdict"],
        **found["more"],
    }
    current = service.current(name)
    folder = None if made["folder"] is None else service.versions(name) / made["folder"]
    ended = service.database.read(lambda c: batches.state_of(c, batch)) == "done"
    if folder is not None and not ended and versions.read(folder) is None:
        raise ExpungeError(f"the version {folder.name} is not there any more")
    before = current
    earlier = False
    if folder is None and current is not None:  # others deleted it meanwhile
        earlier = True
        record = {**about_others(current["record"]), "batch": batch}
        folder, before = service.current_folder(current), _before(service, current)
    named = folder or _in_force(service, name, current)
    try:
        signed = certificates(service, name, covered, record, named, before, earlier=earlier)
    except CannotSign as error:
        _waits(service, str(error), lambda c: batches.members(c, batch))
        return {"waits": True}
    record["certificate"] = first_fingerprint(signed)

    def write(connection: sa.Connection) -> bool:
        return batches.release(
            connection, batch, name, made["folder"], made["weights"], record, signed, made["base"]
        )

    if not service.database.write(write):
        raise ExpungeError("another version came into force while this one was made")
    return {"requests": len(held), "version": made["base"] + (made["folder"] is not None)}


def clean(service: Service, batch: str) -> list[str]:
    """Remove superseded versions, which still hold what was deleted since."""
    name, _, _ = service.database.read(lambda c: batches.contents(c, batch))
    count = service.policy.model(name).keep_versions + 1

    def keep(connection: sa.Connection) -> list[str]:
        going_on = batches.open_batches(connection, name)
        made = [f"{one}-{how}" for one in going_on for how in ("policy", "retrain")]
        return [*batches.kept_folders(connection, name, count), *made]

    if (folder := service.current_folder(service.current(name))) is not None:
        service.deleter(name).retire(folder)
    return versions.clean(service.versions(name), lambda: service.database.read(keep))


def reject(service: Service, batch: str, found: Json) -> None:
    """End a batch whose audits failed; the weights in force stay."""
    why = "the audits failed: " + "; ".join(found["broken"])

    def write(connection: sa.Connection) -> None:
        held = batches.members(connection, batch)
        requests.move(connection, held, states.RUNNING, states.AUDITED, {"broken": found["broken"]})
        batches.end(connection, batch, states.REJECTED, why)

    service.database.write(write)
    clean(service, batch)


def give_back(service: Service, batch: str, why: str) -> str:
    """After a failure: several requests are carried out again one by one, a single one has failed."""
    name, held, ids = service.database.read(lambda c: batches.contents(c, batch))
    why = without_samples(why, ids)
    logger().error("batch failed", batch=batch, model=name, why=why)

    def write(connection: sa.Connection) -> str:
        if len(held) > 1:
            batches.give_back(connection, batch, name, service.enqueue, why)
            return "given back"
        batches.end(connection, batch, states.FAILED, why)
        return "failed"

    done = service.database.write(write)
    clean(service, batch)
    return done

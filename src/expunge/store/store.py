"""Store: append-only evidence about runs, their tensors and findings, and the jobs of suites."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from torch import Tensor

from expunge.core.audit import Finding
from expunge.core.errors import StoreError
from expunge.core.method import package_versions
from expunge.store import archive, queries, rows, schema
from expunge.store.blobs import Blobs
from expunge.store.database import Database
from expunge.store.diff import INPUTS, Difference, differences
from expunge.store.ids import new_id
from expunge.store.rows import Run
from expunge.store.suites import SuiteLog


class Store(SuiteLog):
    """One folder: `store.sqlite` beside `blobs/`. Entries are added, never changed or removed.

    Several processes may read and write at once. A process that is killed leaves the store as it
    was before the call that it was in; what else it leaves behind is removed by `gc`.
    """

    def __init__(self, folder: Path) -> None:
        """Remember a folder; use `open` or `temporary` instead."""
        self.folder = folder
        self._database = Database(folder / "store.sqlite")
        self._blobs = Blobs(folder)

    @classmethod
    def open(cls, folder: str | Path | None = None) -> Store:
        """Open a store; nothing is written before the first entry, and a missing one is empty.

        Args:
            folder: where it lies; the default is `$EXPUNGE_STORE`, else `./.expunge`.

        Returns:
            The store.
        """
        chosen = folder or os.environ.get("EXPUNGE_STORE") or ".expunge"
        return cls(Path(chosen).expanduser().absolute())

    @classmethod
    def temporary(cls) -> Store:
        """Open a store in a temporary folder that is removed together with the object."""
        folder = tempfile.mkdtemp(prefix="expunge-")
        store = cls(Path(folder))
        weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
        return store

    def put_run(
        self,
        *,
        kind: str,
        key: str,
        record: dict[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        parents: Sequence[str] = (),
        status: str = "done",
    ) -> str:
        """Add a run, unless one of the same kind and key is done.

        Args:
            kind: original, reference, prepare, unlearn, audit, or of a fleet: fleet, shadow,
                checkpoint, outputs.
            key: content key of everything the run rests on.
            record: what is known about it; problem, method, seed and weights are found by name.
            tensors: what it made, kept as one blob.
            parents: ids of runs it was made from.
            status: `done`, or how else it ended.

        Returns:
            The run's id; the earlier one's if there is one.

        Raises:
            StoreError: a parent is not in the store, or the record has no JSON form.
            ExpungeError: the store cannot be written.
        """
        return self._put(kind, key, record, tensors or {}, parents, status, [])

    def _put(
        self,
        kind: str,
        key: str,
        record: dict[str, Any],
        tensors: Mapping[str, Tensor],
        parents: Sequence[str],
        status: str,
        findings: Sequence[Mapping[str, Any]],
    ) -> str:
        if not kind or not key or not status:
            raise StoreError("a run needs a kind, a key and a status")
        record, parents = rows.json_form(record, "record"), list(dict.fromkeys(parents))

        def existing(connection: sa.Connection | None) -> str | None:
            missing = sorted(set(parents) - queries.known(connection, parents))
            if missing:
                raise StoreError(f"no run {missing[0]} in {self.folder} to be a parent")
            return queries.done(connection, kind, key) if status == "done" else None

        with self._database.read() as connection:
            empty, found = connection is None, existing(connection)
        if found:
            return found
        with self._blobs.writing():
            if empty:
                # Blobs beside no database would look like a store that lost its records.
                with self._database.write():
                    pass
            blob = self._blobs.put(tensors) if tensors else None
            with self._database.write() as connection:
                found = existing(connection)
                if found:
                    return found
                run = Run.make(
                    id=new_id(),
                    kind=kind,
                    key=key,
                    created=queries.now(),
                    status=status,
                    record=record,
                    parents=parents,
                    blob=blob,
                )
                queries.insert(connection, [(run, findings)])
        return run.id

    def find(self, kind: str, key: str) -> Run | None:
        """Return the finished run of a kind and content key, the oldest if there are several."""
        with self._database.read() as connection:
            found = queries.done(connection, kind, key)
            return None if found is None else queries.runs(connection, schema.runs.c.id == found)[0]

    def get(self, id_or_unique_prefix: str) -> Run:
        """Return a run by its id or the beginning of it.

        Raises:
            StoreError: there is none, or several begin so; some of them are named.
        """
        with self._database.read() as connection:
            found = queries.resolve(connection, schema.runs, id_or_unique_prefix, "run")
            return queries.runs(connection, schema.runs.c.id == found)[0]

    def runs(
        self,
        *,
        kind: str | None = None,
        problem: str | None = None,
        method: str | None = None,
        limit: int | None = None,
    ) -> list[Run]:
        """Runs, newest first, that have the given kind, problem and method."""
        wanted = {"kind": kind, "problem": problem, "method": method}
        where = [schema.runs.c[name] == v for name, v in wanted.items() if v is not None]
        with self._database.read() as connection:
            return queries.runs(connection, *where, limit=limit)

    def tensors(self, run: Run | str) -> dict[str, Tensor]:
        """Tensors of a run, compared with their hash; empty if it has none.

        Raises:
            StoreError: the blob is missing, truncated or altered.
        """
        run = self.get(run) if isinstance(run, str) else run
        return {} if run.blob is None else self._blobs.load(run.blob)

    def put_findings(
        self,
        run: str,
        findings: Sequence[Finding],
        *,
        key: str,
        parents: Sequence[str] = (),
    ) -> str:
        """Add an audit: a run of kind `audit` with the inputs of the audited run.

        Args:
            run: the audited run.
            findings: what was found; per-sample arrays become the audit's blob.
            key: content key of subject, references and audits.
            parents: the reference runs.

        Returns:
            The audit's id; the earlier one's if there is one of this key.

        Raises:
            StoreError: a run is not in the store, or a finding cannot be stored.
            ExpungeError: the store cannot be written.
        """
        audited = self.get(run)
        findings_rows, tensors = rows.to_rows(findings)
        record = {
            "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "audited": audited.id,
            **{k: audited.record[k] for k in (*INPUTS, "weights") if k in audited.record},
            "packages": package_versions(),
            "findings": rows.summary(findings_rows),
        }
        ancestors = [audited.id, *parents]
        return self._put("audit", key, record, tensors, ancestors, "done", findings_rows)

    def findings(self, run: str) -> list[Finding]:
        """Findings of an audit in their order, with their per-sample arrays.

        Raises:
            StoreError: there is no such run, or its blob is missing or altered.
        """
        audit = self.get(run)
        with self._database.read() as connection:
            found = queries.findings(connection, audit.id)
        tensors = self.tensors(audit)
        return [rows.to_finding(row, tensors) for row in found]

    def audits(self, run: str) -> list[Run]:
        """Audits of a run, newest first."""
        table = schema.parents
        audited = (table.c.parent_id == self.get(run).id) & (table.c.position == 0)
        with self._database.read() as connection:
            chosen = sa.select(table.c.run_id).where(audited)
            return queries.runs(
                connection, schema.runs.c.kind == "audit", schema.runs.c.id.in_(chosen)
            )

    def diff(self, a: str, b: str, results: bool = False) -> list[Difference]:
        """What differs between two runs, as `(dotted path, value of a, value of b)`.

        Args:
            a: one run.
            b: the other.
            results: also compare what came out, not only what was given.

        Returns:
            One entry a difference; ids, times, cost and curves are left out.
        """
        left, right = self.get(a), self.get(b)
        return differences(
            {**left.record, "kind": left.kind}, {**right.record, "kind": right.kind}, results
        )

    def export(self, ids: Sequence[str], path: Path) -> None:
        """Write runs with all their ancestors and blobs into one .tar file.

        Raises:
            StoreError: a run is not in the store, or a blob is missing or altered.
            ExpungeError: the file cannot be written.
        """
        if not ids:
            raise StoreError("name at least one run to export")
        chosen: dict[str, Run] = {}
        waiting = [self.get(name) for name in ids]
        while waiting:
            run = waiting.pop()
            if run.id not in chosen:
                chosen[run.id] = run
                waiting += [self.get(parent) for parent in run.parents]
        for digest in {run.blob for run in chosen.values() if run.blob}:
            self._blobs.load(digest)
        with self._database.read() as connection:
            entries = [(run, queries.findings(connection, run.id)) for run in chosen.values()]
        archive.write(Path(path), entries, self._blobs.path)

    def import_(self, path: Path) -> list[str]:
        """Add the runs of an exported file; all of them or none.

        Returns:
            Ids of the runs that were not in the store before.

        Raises:
            StoreError: the file is not an export, was altered, or contradicts the store.
            ExpungeError: the store cannot be written.
        """
        with archive.Archive(Path(path)) as opened:
            with self._database.read() as connection:
                empty, new = connection is None, self._news(connection, opened)
            if not new:
                return []
            with self._blobs.writing():
                if empty:
                    with self._database.write():
                        pass
                for digest in opened.blobs:
                    self._blobs.put_stream(opened.chunks(digest), digest)
                with self._database.write() as connection:
                    new = self._news(connection, opened)
                    queries.insert(connection, new)
        return [run.id for run, _ in new]

    def _news(
        self, connection: sa.Connection | None, opened: archive.Archive
    ) -> list[archive.Entry]:
        """Entries of an export that this store lacks, after comparing those it has."""
        offered = {run.id: (run, findings) for run, findings in opened.entries}
        outside = {p for run, _ in opened.entries for p in run.parents} - set(offered)
        missing = sorted(outside - queries.known(connection, outside))
        if missing:
            raise StoreError(f"{opened.path} is refused: the ancestor {missing[0]} is missing")
        known = queries.known(connection, offered)
        for run in queries.runs(connection, schema.runs.c.id.in_(known)) if known else []:
            if (run, queries.findings(connection, run.id)) != offered[run.id]:
                raise StoreError(
                    f"{opened.path} is refused: run {run.id} is in the store with another content"
                )
        return [entry for name, entry in offered.items() if name not in known]

    def gc(self, dry_run: bool = False) -> list[str]:
        """Remove blobs that no run refers to, and what killed processes left behind.

        Args:
            dry_run: only say what would be removed.

        Returns:
            Paths of the files, relative to the folder.

        Raises:
            StoreError: there are blobs but no database; they may be all that is left of it.
            ExpungeError: the folder cannot be written.
        """
        if not self.folder.is_dir():
            return []
        with self._database.read():
            pass  # a store that cannot be read is not touched at all
        with self._blobs.alone(), self._database.read() as connection:
            if connection is None and any(self.folder.glob("blobs/??/*.safetensors")):
                raise StoreError(
                    f"{self.folder} holds blobs but no records; put store.sqlite back, "
                    "or remove the folder by hand"
                )
            blob = schema.runs.c.blob
            query = sa.select(blob).where(blob.is_not(None)).distinct()
            used = set(connection.scalars(query)) if connection is not None else set()
            return self._blobs.collect(used, dry_run)

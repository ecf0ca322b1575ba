"""Run audits on a subject: resolve names, check needs, report progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from expunge.audits import SUITES, registry
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.errors import NeedsError
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime
from expunge.core.strata import Strata


def audit_list(audits: str | Sequence[str | Audit], problem: Problem | None = None) -> list[Audit]:
    """Turn a suite's name, or a list of names and instances, into audits.

    Args:
        audits: a suite's name or a list.
        problem: what is to be audited; a suite leaves out what is for another kind of problem.

    Returns:
        The audits, in order.

    Raises:
        UserError: a name is unknown.
    """
    suite = isinstance(audits, str) and audits in SUITES
    if isinstance(audits, str):
        audits = SUITES.get(audits, (audits,))
    found = [a if isinstance(a, Audit) else registry.get(a)() for a in audits]
    # a problem described by functions may offer what any audit needs
    if not suite or problem is None or problem.kind == "custom":
        return found
    return [a for a in found if a.domain in ("general", problem.kind)]


def run_audits(
    subject: Subject,
    references: Sequence[Subject],
    audits: str | Sequence[str | Audit],
    runtime: Runtime,
    strata: Strata | None = None,
) -> list[Finding]:
    """Run audits one after the other.

    Args:
        subject: the released model.
        references: models retrained without the data; may be empty.
        audits: a suite's name or a list.
        runtime: seeds, threads and progress.
        strata: parts of the training samples; see `stratified`.

    Returns:
        All findings, those of the strata after those of the whole. An audit whose needs are not met gives one finding without a value and the
        reason, so that the rest of a suite still runs.

    Raises:
        NeedsError: the needs of an audit that was asked for by its own name are not met.
    """
    chosen = audit_list(audits, subject.problem)
    by_name = [] if isinstance(audits, str) and audits in SUITES else audits
    named = {by_name} if isinstance(by_name, str) else {a for a in by_name if isinstance(a, str)}
    findings: list[Finding] = []
    with runtime.own_threads(), runtime.task("audit", len(chosen)) as task:
        for audit in chosen:
            try:
                audit.needs.check(audit.name, subject.problem)
                found = audit.run(subject, references, runtime)
                findings += found
                if strata is not None:
                    findings += stratified(audit, found, strata, subject, references, runtime)
            except NeedsError as error:
                if audit.name in named:
                    raise
                findings.append(Finding(f"{audit.name}/all", None, reason=str(error)))
            task.advance()
    return findings


def stratified(
    audit: Audit,
    whole: Sequence[Finding],
    strata: Strata,
    subject: Subject,
    references: Sequence[Subject],
    runtime: Runtime,
) -> list[Finding]:
    """Break the per-sample findings of an audit down: the same audit on each part of the samples.

    Any audit will do, since it sees only a subject with narrowed splits; so a stratum's value,
    interval and references' value are made exactly as those of the whole.

    Args:
        audit: the audit.
        whole: what it found on all samples.
        strata: the parts.
        subject: the released model.
        references: retrained models.
        runtime: seeds.

    Returns:
        Findings called `audit/what@stratum`, for what has per-sample values of training samples. A
        stratum without a sample on a side gives no value, and the reason.
    """
    sizes = {f.name: _samples(f) for f in whole if f.per_sample}
    if not sizes:
        return []
    found: dict[str, list[Finding]] = {name: [] for name in sizes}
    for stratum, ids in strata.parts.items():
        for f in audit.run(subject.within(ids), [r.within(ids) for r in references], runtime):
            if f.name in found:
                found[f.name].append(replace(f, name=f"{f.name}@{stratum}"))
    # a finding about test samples is the same in all strata: it is no part of anything
    return [
        f
        for name, parts in found.items()
        if any(_samples(part) < sizes[name] for part in parts)
        for f in parts
    ]


def _samples(finding: Finding) -> int:
    return max(map(len, finding.per_sample.values()), default=0)

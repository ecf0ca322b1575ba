"""Run audits on a subject: resolve names, check needs, report progress."""

from __future__ import annotations

from collections.abc import Sequence

from expunge.audits import SUITES, registry
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.errors import NeedsError
from expunge.core.runtime import Runtime


def audit_list(audits: str | Sequence[str | Audit]) -> list[Audit]:
    """Turn a suite's name, or a list of names and instances, into audits.

    Raises:
        UserError: a name is unknown.
    """
    if isinstance(audits, str):
        audits = SUITES.get(audits, (audits,))
    return [a if isinstance(a, Audit) else registry.get(a)() for a in audits]


def run_audits(
    subject: Subject,
    references: Sequence[Subject],
    audits: str | Sequence[str | Audit],
    runtime: Runtime,
) -> list[Finding]:
    """Run audits one after the other.

    Args:
        subject: the released model.
        references: models retrained without the data; may be empty.
        audits: a suite's name or a list.
        runtime: seeds, threads and progress.

    Returns:
        All findings. An audit whose needs are not met gives one finding without a value and the
        reason, so that the rest of a suite still runs.

    Raises:
        NeedsError: the needs of an audit that was asked for by its own name are not met.
    """
    chosen = audit_list(audits)
    by_name = [] if isinstance(audits, str) and audits in SUITES else audits
    named = {by_name} if isinstance(by_name, str) else {a for a in by_name if isinstance(a, str)}
    findings: list[Finding] = []
    with runtime.own_threads(), runtime.task("audit", len(chosen)) as task:
        for audit in chosen:
            try:
                audit.needs.check(audit.name, subject.problem)
                findings += audit.run(subject, references, runtime)
            except NeedsError as error:
                if audit.name in named:
                    raise
                findings.append(Finding(f"{audit.name}/all", None, reason=str(error)))
            task.advance()
    return findings

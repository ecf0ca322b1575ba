"""Deletion by a method of the library: approximate, audited beside retrained models, or retrained at last."""

from __future__ import annotations

import fcntl
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.core.audit import Subject
from expunge.core.errors import ExpungeError, ModelError, RequestError, UserError
from expunge.core.hashing import hash_model, hash_tensors
from expunge.core.method import Method, package_versions, unlearn
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.fleet.executors import chosen, in_order
from expunge.fleet.jobs import Job
from expunge.fleet.references import FIRST_SEED
from expunge.report.classes import EvidenceClass, evidence_class
from expunge.report.statement import finding_row, not_tested
from expunge.service.covering import Covering
from expunge.service.deleter import Json, Resolved
from expunge.service.deleters import imported
from expunge.service.policy import MethodModel, Policy

WEIGHTS, DELETED = "model.safetensors", "deleted.json"


class MethodDeleter:
    """A problem, and the method and audits that the policy names for it."""

    def __init__(self, policy: Policy, model: MethodModel, name: str) -> None:
        """Load the problem.

        Raises:
            UserError: problem, method or audits are unknown, or do not fit each other.
        """
        from expunge.audits.run import audit_list
        from expunge.methods import registry

        self._model = model
        self._method: Method = registry.get(model.method).create(model.settings)
        self._retrain: Method = registry.get("retrain").create({})
        self.evidence = released_class(self._method)
        self.problem = problem_of(policy, model.problem, name)
        self._audits = audit_list(model.audits, self.problem)
        if (model.references or model.if_audits_fail == "retrain") and self.problem.recipe is None:
            raise UserError(
                f"models.{name}: the problem has no recipe to retrain with; say references = 0 and "
                'if_audits_fail = "reject"'
            )
        self._covering = Covering(self.problem.train)
        self._references: dict[frozenset[int], list[nn.Module]] = {}

    # ------------------------------------------------------------------ what is there

    def resolve(self, request: Request, version: Path | None) -> Resolved:
        """Find what a request covers of the data that is left."""
        ids, unknown = self._covering.covers(request)
        gone = set(deleted(version))
        new = [i for i in ids if i not in gone]
        left = len(self._covering.known) - len(gone) - len(new)
        return Resolved(tuple(new), tuple(unknown), tuple(i for i in ids if i in gone), (), left)

    def weights(self, version: Path | None) -> str:
        """Hash of the state dict."""
        return self.problem.model_hash() if version is None else _hash(version)

    def plan(self, ids: Sequence[int], version: Path | None) -> Json:
        """Name method, audits, and the models that are retrained to compare with."""
        return {
            "method": self._method.name, "settings": self._method.in_force(),
            "audits": [a.name for a in self._audits], "references": self._model.references,
            "if_audits_fail": self._model.if_audits_fail, "samples": len(ids),
            "kept": len(self._covering.known) - len(deleted(version)) - len(ids),
            "evidence": self.evidence,
        }  # fmt: skip

    # ------------------------------------------------------------------ deleting and looking

    def forget(self, ids: Sequence[int], version: Path | None, target: Path, how: str) -> Json:
        """Run the method, or retrain, on the version in force; write the weights."""
        method = self._retrain if how == "retrain" else self._method
        problem = self._problem(version)
        request = Request(ids=tuple(ids))
        if len(ids) >= len(problem.train):
            raise RequestError("the request covers all the data that is left")
        runtime = Runtime(seed=self._model.seed)
        outcome = unlearn(problem, request, method, runtime=runtime, passed=self._model.settings)
        if outcome.change is not None and outcome.change.kind not in ("weights", "delta"):
            raise UserError(
                f"{method.name} does not change the weights but puts {outcome.change.kind}s around "
                "them; the service releases plain weights"
            )
        released = outcome.released()
        kind = released_class(method)
        tensors = {
            k: v.detach().cpu().contiguous().clone() for k, v in released.state_dict().items()
        }
        save_file(tensors, target / WEIGHTS)
        # salted, so that no hash of the file tells who is in it
        gone = {"salt": secrets.token_hex(16), "ids": sorted({*deleted(version), *ids})}
        (target / DELETED).write_text(json.dumps(gone))
        return {
            "weights": hash_model(released), "weights_before": self.weights(version),
            "evidence": kind, "method": method.name, "settings": method.in_force(),
            "seed": self._model.seed, "link": method.card.link, "seconds": outcome.cost.seconds,
            "intent": method.card.intent, "guarantee": method.card.guarantee,
            "packages": package_versions(),
        }  # fmt: skip

    def audit(
        self, ids: Sequence[int], version: Path | None, target: Path, how: str
    ) -> tuple[list[Json], Json]:
        """Audit the weights on disk beside models retrained without everything deleted so far."""
        from expunge.audits.run import run_audits

        problem, request = self._problem(version), Request(ids=tuple(ids))
        runtime = Runtime(seed=self._model.seed)
        subject = Subject(self._load(target), problem, request, runtime)
        references = [
            Subject(model, problem, request, runtime)
            for model in self._retrained([*deleted(version), *ids])
        ]
        found = run_audits(subject, references, self._audits, runtime)
        rows = [finding_row(f) for f in found]
        more = {
            "untested": not_tested(rows, [problem.kind]),
            "references": [{"seed": FIRST_SEED + n} for n in range(len(references))],
        }
        return rows, more

    def predictor(self, version: Path | None) -> nn.Module:
        """The model of a version."""
        return self._load(version)

    def verify(self, version: Path) -> list[str]:
        """Compare the weights on disk with what their record says."""
        from expunge.service.versions import RECORD, read

        record = read(version)
        try:
            found = _hash(version)
            deleted(version)
        except (OSError, ExpungeError, ValueError) as error:
            return [f"{version.name} cannot be read: {error}"]
        if record is not None and record["weights"] != found:
            return [f"{version.name}/{WEIGHTS} is not what {RECORD} describes"]
        return []

    def retire(self, version: Path) -> None:
        """Nothing: where the original model lies is not ours to know."""

    # ------------------------------------------------------------------ models

    def _load(self, version: Path | None) -> nn.Module:
        import copy

        model = copy.deepcopy(self.problem.model)
        if version is not None:
            model.load_state_dict(load_file(version / WEIGHTS))
        return model.eval()

    def _problem(self, version: Path | None) -> Problem:
        if version is None:
            return self.problem
        gone = torch.tensor(deleted(version), dtype=torch.long)
        data = self.problem.train
        return self.problem.about(self._load(version), data.only(data.without(gone)))

    def _retrained(self, gone: Sequence[int]) -> list[nn.Module]:
        key = frozenset(gone)
        if key not in self._references:
            keep = self.problem.train.without(torch.tensor(sorted(key), dtype=torch.long))
            seeds = range(FIRST_SEED, FIRST_SEED + self._model.references)
            jobs = [Job(keep, seed, "reference") for seed in seeds]
            runtime = Runtime(seed=self._model.seed)
            made = in_order(chosen(None, runtime).run(self.problem, jobs, runtime)) if jobs else []
            self._references = {key: [done.model for done in made]}  # the last alone
        return self._references[key]


def released_class(method: Method) -> EvidenceClass:
    """Class of evidence of what the service releases: no proof's bound is at hand for its weights."""
    kind = evidence_class(method.card.intent, method.card.guarantee)
    return "empirical" if kind == "certified" else kind


def deleted(version: Path | None) -> list[int]:
    """Samples that a version's model has forgotten, sorted."""
    if version is None:
        return []
    return [int(i) for i in json.loads((version / DELETED).read_text())["ids"]]


def _hash(version: Path) -> str:
    return hash_tensors(load_file(version / WEIGHTS))


def problem_of(policy: Policy, name: str, model: str) -> Problem:
    """The problem that a policy names: `workload:NAME` or `package.module:function`.

    A workload's original is trained once and kept beside the versions.

    Raises:
        UserError: there is none.
    """
    kind, _, rest = name.partition(":")
    if kind != "workload":
        made = imported(name, policy)()
        if not isinstance(made, Problem):
            raise UserError(f"{name} returns no problem")
        return made
    from expunge.workloads import registry

    workload = registry.get(rest)
    folder = policy.folder / "originals"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{model}-{rest}.safetensors"
    with (folder / ".lock").open("w") as lock:  # processes that start together train it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            return workload.problem(weights=_original(file))
        problem = workload.problem()
        draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        tensors: dict[str, Any] = {k: v.contiguous().clone() for k, v in problem.model.state_dict().items()}  # fmt: skip
        save_file(tensors, draft)
        draft.rename(file)
    return problem


def _original(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own
        raise ModelError(f"{file} cannot be read; remove it to train it again") from error

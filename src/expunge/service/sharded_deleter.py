"""Exact deletion: adapters of a sharded model are switched off in a copy that shares the files of the rest."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from expunge.core.audit import Subject
from expunge.core.errors import UserError
from expunge.core.method import package_versions
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.exact.sharded import Sharded
from expunge.exact.verify import verify_folder
from expunge.report.statement import ALWAYS_UNTESTED, finding_row
from expunge.service.covering import Covering
from expunge.service.deleter import Json, Resolved
from expunge.service.deleters import imported
from expunge.service.policy import Policy, ShardedModel

LINK = "https://arxiv.org/abs/2406.16257"
SMALL = ("manifest.json", "live.json")


class ShardedDeleter:
    """A folder of `xp.Sharded`, and its versions beside it."""

    def __init__(self, policy: Policy, model: ShardedModel, name: str) -> None:
        """Open the folder.

        Raises:
            UserError: there is no sharded model, it has another backbone, or audits were named without
                a problem that gives data.
        """
        self._model = model
        self.origin = policy.path(model.folder)
        self._backbone = backbone_of(policy, model.problem)
        self._opened: dict[Path, Sharded] = {}
        self._lock = threading.Lock()
        first = self._open(None)
        self.evidence = "exact" if first.exact else "empirical"
        self._covering = None
        if isinstance(self._backbone, Problem):
            self._covering = Covering(self._backbone.train)
        elif model.audits:
            raise UserError(f"models.{name}: audits need a problem, not a backbone alone")

    # ------------------------------------------------------------------ what is there

    def resolve(self, request: Request, version: Path | None) -> Resolved:
        """Find what a request covers, by the manifest and, where it speaks of more than ids, the data."""
        sharded = self._open(version)
        asked: Any = request
        if request.ids is None and self._covering is not None:
            asked, _ = self._covering.covers(request)
        plan = sharded.plan(asked)
        left = sharded.status().samples - len(plan.ids)
        already = tuple(int(i) for i in plan.already)
        return Resolved(plan.ids, plan.unknown, already, plan.outside, left)

    def weights(self, version: Path | None) -> str:
        """Hash of the weights that are served."""
        return self._open(version).weights_hash()

    def plan(self, ids: Sequence[int], version: Path | None) -> Json:
        """What is switched off, which shards die, other samples lost, the lifetime left, seconds."""
        plan = self._open(version).plan(list(ids))
        shown = plan.to_dict()
        for name in ("ids", "already", "unknown", "outside"):
            shown.pop(name)
        return {"samples": len(ids), "sentence": str(plan), "evidence": self.evidence, **shown}

    # ------------------------------------------------------------------ deleting and looking

    def forget(self, ids: Sequence[int], version: Path | None, target: Path, how: str) -> Json:
        """Switch off what saw the samples; train anew where the policy says so."""
        began = time.perf_counter()
        _link(version or self.origin, target)
        sharded = Sharded.load(target, self._backbone)
        done = sharded.forget(list(ids))
        plan, retrained = done.plan, []
        if how == "retrain":
            retrained = list(range(sharded.settings.shards))
        elif plan.stops or (self._model.retrain == "dead" and plan.dies):
            retrained = list(sharded.status().dead)
        if retrained:
            sharded.retrain(retrained)
        status = sharded.status()
        off = [
            {
                "shard": shard,
                "slices": list(plan.hits.get(shard, ())),
                "adapters": [f"shard{shard}/{'-'.join(map(str, order))}" for order in orders],
            }
            for shard, orders in sorted(plan.off.items())
        ]
        settings = sharded.settings
        return {
            "weights": status.weights, "weights_before": done.weights_before,
            "evidence": self.evidence, "method": "sharded", "settings": settings.in_force(),
            "link": LINK, "seconds": time.perf_counter() - began, "deletion_seconds": done.seconds,
            "exact": {
                "switched_off": off, "manifest": status.manifest, "before": done.weights_before,
                "after": status.weights, "retrained": retrained,
                "died": [shard for shard in plan.dies if shard not in retrained],
                "collateral": status.collateral,
            } if self.evidence == "exact" else None,
            "remaining": status.remaining, "packages": package_versions(),
        }  # fmt: skip

    def audit(
        self, ids: Sequence[int], version: Path | None, target: Path, how: str
    ) -> tuple[list[Json], Json]:
        """Run the policy's audits on the ensemble; exactness itself needs none."""
        if not self._model.audits or not isinstance(self._backbone, Problem):
            return [], {"untested": ["No audit was run; exactness rests on the records of the training."]}  # fmt: skip
        from expunge.audits.run import audit_list, run_audits

        problem, runtime = self._backbone, Runtime()
        request = Request(ids=tuple(ids))
        subject = Subject(self._open(target, keep=False).module(), problem, request, runtime)
        found = run_audits(subject, [], audit_list(self._model.audits, problem), runtime)
        return [finding_row(f) for f in found], {"untested": list(ALWAYS_UNTESTED)}

    def predictor(self, version: Path | None) -> nn.Module:
        """The live ensemble of a version."""
        return self._open(version, keep=False).module()

    def verify(self, version: Path) -> list[str]:
        """Compare every file of a version with its manifest."""
        return verify_folder(version)

    def retire(self, version: Path) -> None:
        """Delete from the folder that was trained what a version deleted: its dead stages are erased."""
        now = Sharded.load(version, self._backbone)._now
        gone = now.index.ids[now.live.deleted].tolist()
        if gone:
            Sharded.load(self.origin, self._backbone).forget(gone)

    # ------------------------------------------------------------------ folders

    def _open(self, version: Path | None, *, keep: bool = True) -> Sharded:
        """A version, opened once; a version never changes."""
        folder = version or self.origin
        with self._lock:
            if folder not in self._opened:
                opened = Sharded.load(folder, self._backbone)
                if not keep:
                    return opened
                self._opened = {folder: opened}  # the last alone
            return self._opened[folder]


def _link(source: Path, target: Path) -> None:
    """Make a version that shares the tensors, which are named by content and never change."""
    for name in SMALL:
        shutil.copyfile(source / name, target / name)
    (target / "stages").mkdir()
    for file in (source / "stages").glob("*.safetensors"):
        try:
            os.link(file, target / "stages" / file.name)
        except OSError:  # another file system
            shutil.copyfile(file, target / "stages" / file.name)


def backbone_of(policy: Policy, name: str) -> nn.Module | Problem:
    """What the policy names: a problem, or the backbone alone.

    Raises:
        UserError: it is neither.
    """
    kind, _, rest = name.partition(":")
    if kind == "workload":
        from expunge.workloads import registry

        return registry.get(rest).untrained()
    made = imported(name, policy)()
    if not isinstance(made, (nn.Module, Problem)):
        raise UserError(f"{name} returns neither a problem nor a network")
    return made

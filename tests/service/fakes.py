"""A small deleter whose model is the set of ids it holds; slow and faulty on demand."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from torch import nn

from expunge.core.data import Data
from expunge.core.hashing import content_key
from expunge.core.request import Request
from expunge.service.deleter import Resolved


class Sum(nn.Module):
    """Adds its one weight to what comes in."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return x + self.value


class FakeDeleter:
    evidence = "exact"

    def __init__(self, samples=1000, seconds=0.0, poison=(), audits=None, log=None):
        self.data = Data((torch.zeros(samples, 1), torch.arange(samples) % 10))
        self.seconds = seconds
        self.poison = set(poison)
        self.audits = audits or {"policy": 0.5, "retrain": 0.5}
        self.log = None if log is None else Path(log)

    def _gone(self, version):
        return set() if version is None else set(json.loads((version / "gone.json").read_text()))

    def resolve(self, request: Request, version):
        gone = self._gone(version)
        known = set(self.data.ids.tolist())
        if request.form == "ids":
            wanted = [int(i) if str(i).isdigit() else i for i in request.ids]
            unknown = tuple(i for i in wanted if i not in known)
            ids = [i for i in wanted if i in known]
        else:
            unknown, ids = (), request.resolve(self.data).tolist()
        new = tuple(sorted(set(ids) - gone))
        return Resolved(
            new, unknown, tuple(sorted(set(ids) & gone)), (), len(known) - len(gone) - len(new)
        )

    def weights(self, version):
        return content_key(sorted(self._gone(version)))

    def plan(self, ids, version):
        return {"seconds": self.seconds, "samples": len(ids)}

    def forget(self, ids, version, target, how):
        time.sleep(self.seconds)
        if self.poison & set(ids):
            raise RuntimeError("this sample cannot be deleted")
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps({"ids": list(ids), "pid": os.getpid()}) + "\n")
        gone = sorted(self._gone(version) | set(ids))
        (target / "gone.json").write_text(json.dumps(gone))
        return {
            "weights": content_key(gone), "weights_before": self.weights(version),
            "evidence": "exact", "method": "fake", "settings": {}, "seconds": self.seconds,
        }  # fmt: skip

    def audit(self, ids, version, target, how):
        time.sleep(self.seconds)
        value = self.audits[how]
        return [
            {"name": "fake/auc", "value": value, "reference": 0.5, "direction": "reference"}
        ], {}

    def predictor(self, version):
        return Sum(float(len(self._gone(version)))).eval()

    def verify(self, version):
        return [] if (version / "gone.json").exists() else [f"{version} holds no gone.json"]

    def retire(self, version):
        pass


def make(**settings):
    return FakeDeleter(**settings)

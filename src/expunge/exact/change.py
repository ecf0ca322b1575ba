"""What a sharded model serves as a change that can be stored, applied and audited like a method's."""

from __future__ import annotations

import copy
import datetime as dt
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError, NeedsError, RequestError, StoreError
from expunge.core.hashing import hash_model
from expunge.core.method import package_versions
from expunge.core.outcome import Cost, Outcome, Shards
from expunge.core.request import Request
from expunge.exact.ensemble import Ensemble
from expunge.exact.folder import Folder
from expunge.exact.now import Now
from expunge.exact.plan import Deleted
from expunge.exact.settings import Settings
from expunge.exact.slots import Slots
from expunge.exact.stages import served

if TYPE_CHECKING:
    from expunge.exact.sharded import Sharded

_CONFIG, _BACKBONE = "config.json", "backbone/"


def change_of(folder: Folder, now: Now) -> Shards:
    """The stages that are served, with what puts them together.

    Args:
        folder: of the model.
        now: its state.

    Returns:
        Tensors `SHARD-K/NAME` of each live shard's K-th stage, `backbone/NAME` where training started
        fresh, and the settings as the bytes of a JSON text.
    """
    chains = {str(shard): digests for shard, digests in now.served}
    config = {
        "settings": now.manifest["settings"], "slots": now.manifest["slots"],
        "stages": {shard: len(chain) for shard, chain in chains.items()},
    }  # fmt: skip
    tensors = {
        f"{shard}-{k}/{name}": tensor
        for shard, chain in chains.items()
        for k, digest in enumerate(chain)
        for name, tensor in folder.get(digest).items()
    }
    if stored := now.manifest["backbone"]["stored"]:
        tensors |= {_BACKBONE + n: t for n, t in folder.get(stored["tensors"]).items()}
    text = torch.frombuffer(bytearray(json.dumps(config).encode()), dtype=torch.uint8)
    return Shards(tensors | {_CONFIG: text})


def put_on(model: nn.Module, tensors: Mapping[str, Tensor]) -> Ensemble:
    """The ensemble of stored stages on a backbone, which is not changed.

    Raises:
        ModelError: the tensors are not of a sharded model, or do not fit the backbone.
    """
    try:
        config = json.loads(bytes(tensors[_CONFIG].tolist()))
        how, slots = Settings.create(config["settings"]), Slots.read(config["slots"])
        stages = {shard: int(number) for shard, number in config["stages"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"these tensors are of no sharded model ({error})") from error
    base = copy.deepcopy(model).requires_grad_(False).eval()
    if backbone := _part(tensors, _BACKBONE):
        try:
            base.load_state_dict(backbone)
        except RuntimeError as error:
            raise ModelError("the shards belong to another architecture") from error
    chains = [
        [_part(tensors, f"{shard}-{k}/") for k in range(number)] for shard, number in stages.items()
    ]
    return Ensemble([served(base, how, slots, chain) for chain in chains], how.aggregate)


def outcome_of(sharded: Sharded, request: Request, done: Deleted | None) -> Outcome:
    """What is served now, as the outcome of a method; see `Sharded.outcome`.

    Raises:
        NeedsError: the model was loaded without its problem.
        RequestError: samples of the request are not deleted.
        ExpungeError: no shard is alive.
    """
    problem, base = sharded._problem, sharded._base
    if problem is None or base is None:
        raise NeedsError("an outcome is about a problem; load the model with it")
    asked = sharded.plan(request)
    if asked.ids:
        raise RequestError(
            f"{len(asked.ids)} samples of the request are not deleted, such as {asked.ids[0]}; "
            "forget it first"
        )
    now, change = _consistent(sharded)
    # not sharded.module(), which another process may have changed since
    model, settings = (
        put_on(base, change.tensors),
        Settings.create(now.manifest["settings"]).in_force(),
    )
    record: dict[str, Any] = {
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "problem": problem.name,
        "source": problem.source,
        "fingerprint": problem.fingerprint(),
        "request": request.to_dict(),
        "method": {
            "name": "sharded", "class": "expunge.exact.sharded.Sharded", "passed": settings,
            "in_force": settings,
        },
        "runtime": now.manifest["runtime"],
        "packages": package_versions(),
        "weights": hash_model(model),
        "served": now.weights,
        "manifest": now.live.manifest,
        "exact": sharded.exact,
        "forgotten": len(asked.already),
    }  # fmt: skip
    details = {} if done is None else {"deletion": done.to_dict()}
    cost = Cost(seconds=0.0 if done is None else done.seconds)
    return Outcome(model, change, cost=cost, details=details, record=record, problem=problem, request=request)  # fmt: skip


def _consistent(sharded: Sharded) -> tuple[Now, Shards]:
    """A state and its change; read again if another process deleted from it meanwhile."""
    try:
        now = sharded._refreshed()
        return now, change_of(sharded._folder, now)
    except StoreError:
        now = sharded._refreshed()
        return now, change_of(sharded._folder, now)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

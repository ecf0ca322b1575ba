"""Settings of a sharded training: all that its stages depend on besides the data and the backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from expunge.core.errors import SettingError
from expunge.core.settings import Configured, setting
from expunge.exact.sequences import Order, choose
from expunge.train.steps import StepName

WHOLE = "whole"
"""In place of an adapter: all weights train, and a stage is a whole model (SISA)."""


@dataclass(frozen=True)
class Settings(Configured):
    """How a model is trained in shards and slices."""

    shards: int = setting(3, "m, models of the ensemble", low=1, source="card s3t: small run")
    slices: int = setting(4, "L, slices of a shard", low=1, source="card s3t: small run")
    orders: int = setting(2, "B, orders a shard's slices are learned in", low=1)
    adapter: str = setting("lora(8)", "kind of a slice's weights, or whole (SISA)")
    sequences: Literal["cyclic", "matching"] = setting("cyclic", "how the orders are chosen")
    prior: tuple[float, ...] | None = setting(
        None, "probability of a request to fall into each slice; for sequences=matching"
    )
    requests: float = setting(100.0, "t, expected requests; for matching", above=0, source="code")
    epochs: int = setting(15, "passes over a stage's data", low=1, source="card s3t")
    lr: float = setting(3e-3, "learning rate", above=0, source="card s3t: small run")
    step: StepName = setting("adam", "optimiser; a new one every stage", source="card s3t")
    batch_size: int = setting(64, "samples a step", low=1)
    momentum: float = setting(0.0, "of SGD", low=0)
    weight_decay: float = setting(0.0, "L2 coefficient", low=0)
    schedule: Literal["constant", "cosine"] = setting("constant", "of the learning rate in a stage")
    clip: float | None = setting(None, "largest gradient norm", above=0)
    data: Literal["cumulative", "own"] = setting(
        "cumulative", "what a stage learns: all slices so far, or its own", source="S3T; ssf: own"
    )
    blocks: Literal["top-down", "all"] = setting(
        "top-down", "where a slice's adapters sit: in its share of the blocks, or in all"
    )
    layers: tuple[str, ...] = setting(
        (), "ends of the module names that adapters sit on, e.g. q_proj,v_proj; empty: all that fit"
    )
    head: Literal["auto", "train", "none"] = setting(
        "auto", "whether the last layer trains in every stage; auto: not of a language model"
    )
    norm: Literal["frozen", "train"] = setting(
        "frozen", "running statistics: those of the start, or (whole models) part of each stage"
    )
    start: Literal["model", "fresh"] = setting(
        "model",
        "what training starts from: the problem's model, which must not know the data, or one untrained",
    )
    aggregate: Literal["logits", "probabilities"] = setting(
        "logits", "what is averaged over shards", source="S3T code: logits"
    )
    threads: int = setting(1, "torch threads in training; results depend on them", low=1)

    def __post_init__(self) -> None:
        """Check every setting and those that go together.

        Raises:
            SettingError: two settings do not go together.
        """
        super().__post_init__()
        if self.prior is not None and len(self.prior) != self.slices:
            raise SettingError(f"prior holds one probability a slice: {self.slices} of them")
        if self.norm == "train" and self.adapter != WHOLE:
            raise SettingError(
                "norm=train moves running statistics that all slices would share, so that deleting one "
                "would leave its trace; with adapters use norm=frozen"
            )
        self.chosen()

    def chosen(self) -> list[Order]:
        """The sequences of a shard."""
        return choose(self.sequences, self.slices, self.orders, self.prior, self.requests)

    def of_stage(self) -> dict[str, Any]:
        """What one stage depends on: not on how many shards and orders there are, nor on who averages."""
        rest = (
            "shards",
            "slices",
            "orders",
            "sequences",
            "prior",
            "requests",
            "aggregate",
        )
        return {k: v for k, v in self.in_force().items() if k not in rest}

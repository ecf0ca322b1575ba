"""The policy file: which models are served, how each forgets, what has to hold before weights are released.

[service]
database = "service.db"              # a file beside this one, or postgresql://…
folder = "service"                   # versions of the models and signing keys

[models.digits]
kind = "sharded"                     # trained by xp.Sharded: deletion is exact
folder = "digits"
problem = "my_package.models:digits" # the problem it was trained on, or its backbone alone

[models.faces]
kind = "method"                      # anything else: a method, and audits that must pass
problem = "my_package.models:faces"  # or "workload:digits-class"
method = "ssd"
settings = { alpha = 10.0 }
audits = ["accuracy", "membership"]
references = 2
if_audits_fail = "retrain"           # or "reject"
limits = { "membership/auc" = { gap = 0.05 }, "accuracy/retain-test" = { low = 0.9 } }
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from expunge.core.errors import UserError
from expunge.service.database import database_url

NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
"""What a model may be called: it becomes a folder and a part of addresses."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limit(_Strict):
    """What one finding has to keep.

    Attributes:
        gap: largest distance from the retrained references, in the finding's unit.
        low: smallest value.
        high: largest value.
    """

    gap: float | None = Field(default=None, ge=0)
    low: float | None = None
    high: float | None = None

    def broken(
        self, name: str, finding: Mapping[str, Any] | None, *, exact: bool = False
    ) -> str | None:
        """Say how a finding breaks this limit; None if it keeps it.

        A finding that is missing, or that has no value or no reference to compare with, breaks it.

        Args:
            name: of the finding.
            finding: its values; None if it was not measured.
            exact: the model was retrained without the data: its distance from other models that were
                is noise, and `gap` is not asked.
        """
        if finding is None:
            return f"{name} was not measured"
        value, reference = finding.get("value"), finding.get("reference")
        if value is None:
            return f"{name} has no value: {finding.get('reason') or 'no reason given'}"
        if self.low is not None and not value >= self.low:
            return f"{name} is {value:.4g}, below {self.low:g}"
        if self.high is not None and not value <= self.high:
            return f"{name} is {value:.4g}, above {self.high:g}"
        if self.gap is None or exact:
            return None
        if reference is None:
            return f"{name} has no reference to compare with"
        if not abs(value - reference) <= self.gap:
            return (
                f"{name} is {value:.4g}, retrained models have {reference:.4g}: "
                f"farther than {self.gap:g}"
            )
        return None


class _Model(_Strict):
    """What every kind of model may say.

    Attributes:
        hold: whether each request waits for somebody's approval.
        hold_above: requests wait for approval that, with all of the model's in the last `hold_hours` that
            went on without one, come to more samples than this; so a large one does not pass in parts.
        hold_hours: that time; 0 looks at each request by itself.
        unknown: ids that the data lacks make the request be rejected, or are reported while the rest
            is deleted.
        retries: how often a step that failed is tried again, with growing pauses.
        batch_seconds: how long the first request of a batch waits for others.
        batch_requests: most requests carried out together.
        keep_versions: superseded versions left on disk; they still hold what was deleted since.
        limits: what findings have to keep before weights are released.
    """

    hold: bool = False
    hold_above: int | None = Field(default=None, ge=0)
    hold_hours: float = Field(default=24.0, ge=0, le=24 * 366)
    unknown: Literal["reject", "report"] = "reject"
    retries: int = Field(default=3, ge=0, le=20)
    batch_seconds: float = Field(default=0.0, ge=0, le=86400)
    batch_requests: int = Field(default=1000, ge=1)
    keep_versions: int = Field(default=0, ge=0)
    limits: dict[str, Limit] = {}

    def holds(self, count: int, recent: int = 0) -> bool:
        """Whether a request for so many samples waits for approval, after so many without one."""
        recent = recent if self.hold_hours else 0
        return self.hold or (self.hold_above is not None and count + recent > self.hold_above)

    def broken(self, findings: Sequence[Mapping[str, Any]], *, exact: bool = False) -> list[str]:
        """Sentences on the limits that findings break; `exact` as in `Limit.broken`."""
        by_name = {f["name"]: f for f in findings}
        found = (
            limit.broken(name, by_name.get(name), exact=exact)
            for name, limit in self.limits.items()
        )
        return [sentence for sentence in found if sentence is not None]


class ShardedModel(_Model):
    """A model that `xp.Sharded` trained: deletion switches adapters off and is exact.

    Attributes:
        folder: where it was trained to; versions are made beside it, and what they delete is then
            erased there too.
        problem: the problem it was trained on, or its backbone alone, which knows requests by ids
            only: `package.module:function`, or `workload:NAME`.
        retrain: when shards are trained anew: once none is alive (`stopped`), or whenever one dies.
        audits: names, or a suite's name; exactness needs none.
        if_audits_fail: train all shards anew, or reject the requests.
    """

    kind: Literal["sharded"]
    folder: str
    problem: str
    retrain: Literal["stopped", "dead"] = "stopped"
    audits: list[str] = []
    if_audits_fail: Literal["retrain", "reject"] = "reject"


class MethodModel(_Model):
    """Any model, forgotten by a method of the library.

    Attributes:
        problem: `workload:NAME`, or `package.module:function` that returns a problem.
        method: name of the method.
        settings: of the method.
        seed: of method and audits.
        audits: names, or a suite's name.
        references: models retrained for the audits, a training each.
        if_audits_fail: retrain from the recipe without what was deleted, or reject the requests.
    """

    kind: Literal["method"]
    problem: str
    method: str
    settings: dict[str, Any] = {}
    seed: int = 0
    audits: list[str] = ["accuracy", "membership"]
    references: int = Field(default=1, ge=0)
    if_audits_fail: Literal["retrain", "reject"] = "retrain"


class CustomModel(_Model):
    """A deleter of your own: `package.module:function` that returns one (see `deleter.Deleter`).

    Attributes:
        deleter: the function; it is called with `settings` as keyword arguments.
        settings: for the function.
        if_audits_fail: carry out once more as `retrain`, or reject the requests.
    """

    kind: Literal["custom"]
    deleter: str
    settings: dict[str, Any] = {}
    if_audits_fail: Literal["retrain", "reject"] = "reject"


AnyModel = Annotated[ShardedModel | MethodModel | CustomModel, Field(discriminator="kind")]


class Service(_Strict):
    """What holds for all models.

    Attributes:
        database: SQLite file or Postgres address.
        folder: for versions of the models and signing keys.
        poll_seconds: how often a worker looks for work.
        dead_seconds: silence after which a worker of another machine counts as dead.
        body_bytes: largest body of a request over HTTP.
        per_second: requests per second and client over HTTP, on average.
        burst: how many may come at once.
    """

    database: str = "service.db"
    folder: str = "service"
    poll_seconds: float = Field(default=0.2, gt=0, le=60)
    dead_seconds: float = Field(default=30.0, gt=0)
    body_bytes: int = Field(default=1_000_000, ge=1024)
    per_second: float = Field(default=200.0, gt=0)
    burst: int = Field(default=400, ge=1)


class Policy(_Strict):
    """The whole file.

    Attributes:
        service: what holds for all models.
        models: by name.
        file: where it was read from; relative paths start from its folder.
    """

    service: Service = Service()
    models: dict[str, AnyModel] = {}
    file: Path = Path("service.toml")

    @field_validator("models")
    @classmethod
    def _names(cls, models: dict[str, Any]) -> dict[str, Any]:
        for name in models:
            if not re.fullmatch(NAME, name):
                raise ValueError(
                    f"a model is called by small letters, digits, . _ and -, not {name!r}"
                )
        return models

    @property
    def folder(self) -> Path:
        """Folder of versions and keys."""
        return self.path(self.service.folder)

    @property
    def database(self) -> str:
        """Address of the database."""
        return database_url(self.service.database, self.file.parent)

    def path(self, name: str) -> Path:
        """A path of the file, relative to its folder."""
        return (self.file.parent / Path(name).expanduser()).resolve()

    def model(self, name: str) -> ShardedModel | MethodModel | CustomModel:
        """The entry of a model.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self.models:
            known = ", ".join(self.models) or "none yet"
            raise UserError(f"there is no model {name!r} in {self.file}; there is {known}")
        return self.models[name]


def read_policy(file: str | Path) -> Policy:
    """Read a policy file.

    Raises:
        UserError: it cannot be read; says which entry is wrong.
    """
    path = Path(file).expanduser()
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"cannot read the policy {path}: {error.strerror}; name it with --policy"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    if "file" in values:
        raise UserError(f"{path}: there is no entry 'file'")
    try:
        return Policy(**values, file=path.resolve())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where}: {first['msg']}") from error

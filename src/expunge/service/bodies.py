"""What goes over HTTP, as the OpenAPI document describes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from expunge.core.request import Request, forget
from expunge.service import states
from expunge.service.policy import NAME

IDENTIFIER = r"^[0-9a-hjkmnp-tv-z]{4,26}$"
PRINTABLE = r"^[ -~]{1,200}$"
Sample = Annotated[StrictInt, Field(ge=-(2**62), le=2**62)] | Annotated[StrictStr, Field(min_length=1, max_length=200)]  # fmt: skip
State = Literal[
    "received", "resolved", "planned", "approved", "running", "audited", "released", "rejected",
    "failed", "cancelled",
]  # fmt: skip
assert set(State.__args__) == set(states.STATES)  # type: ignore[attr-defined]


class Submission(BaseModel):
    """A request to delete; exactly one of ids, label, where, user."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(pattern=f"^{NAME}$", description="name of the model in the policy")
    ids: list[Sample] | None = Field(None, min_length=1, max_length=20_000, description="sample ids or outside names")  # fmt: skip
    label: list[StrictInt] | None = Field(None, min_length=1, max_length=1000, description="whole classes")  # fmt: skip
    where: str | None = Field(None, min_length=1, max_length=2000, description="a condition on columns of the data, such as label == 3 and id < 100")  # fmt: skip
    user: list[Sample] | None = Field(None, min_length=1, max_length=20_000, description="all samples of users, by the column user")  # fmt: skip
    reason: str = Field("", max_length=1000, description="why; purged with the selector at the end")

    def request(self) -> Request:
        """The request it states.

        Raises:
            RequestError: none or several forms were given.
        """
        forms = {k: v for k in ("ids", "label", "where", "user") if (v := getattr(self, k)) is not None}  # fmt: skip
        return forget(**{k: tuple(v) if isinstance(v, list) else v for k, v in forms.items()}, reason=self.reason)  # fmt: skip


class RequestOut(BaseModel):
    """A request as the service sees it; what it named is not shown."""

    id: str
    model: str
    state: State
    form: str = Field(description="ids, label, where or user")
    samples: int | None = Field(description="how many samples it covers, once resolved")
    hold: bool = Field(description="whether it waits, or waited, for approval")
    attempt: int
    created: str
    updated: str
    error: str | None = Field(description="why it was not carried out, or what it waits for")
    result: dict[str, Any] | None = Field(description="outcome, version, findings")
    certificate: bool = Field(description="whether there is one to download")


class PlanOut(BaseModel):
    """What carrying out a request takes."""

    id: str
    state: State
    hold: bool
    samples: int | None
    plan: dict[str, Any] | None


class Withdrawal(BaseModel):
    """Why a request is withdrawn."""

    model_config = ConfigDict(extra="forbid")
    reason: str = Field("", max_length=1000)


class Inputs(BaseModel):
    """A batch of inputs."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(pattern=f"^{NAME}$")
    inputs: list[Any] = Field(min_length=1, max_length=10_000, description="nested lists [B, …]")
    kind: Literal["float", "int"] = Field("float", description="what the numbers are")


class Outputs(BaseModel):
    """What the version in force says."""

    outputs: list[Any]
    version: int
    weights: str


class ModelOut(BaseModel):
    """A model and its version in force."""

    name: str
    kind: str
    version: int
    weights: str | None = Field(description="SHA-256; null for the model as it was trained")
    created: str | None


class Problem(BaseModel):
    """Why something was not done: one sentence."""

    detail: str


class Status(BaseModel):
    """Health or readiness."""

    status: str


def shown(row: Mapping[str, Any]) -> RequestOut:
    """A row of the database as it is shown."""
    return RequestOut(
        id=row["id"], model=row["model"], state=row["state"], form=row["form"],
        samples=row["count"], hold=row["hold"], attempt=row["attempt"], created=row["created"],
        updated=row["updated"], error=row["error"], result=row["result"],
        certificate=row["certificate"] is not None,
    )  # fmt: skip

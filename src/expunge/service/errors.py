"""Answers of the service that are no success, each with the status it has over HTTP."""

from __future__ import annotations

from expunge.core.errors import UserError


class NotFound(UserError):
    """There is no such request, model or certificate."""

    status = 404


class Conflict(UserError):
    """The request is not in a state for this."""

    status = 409


class Reused(UserError):
    """An idempotency key came a second time with another content."""

    status = 422


class NotAcceptable(UserError):
    """What is asked for cannot be made in this form here."""

    status = 406

"""Errors that are sentences for people.

Two kinds matter to a caller: what the user can mend (`UserError`, exit code 2) and what went
wrong on the way (`ExpungeError`, exit code 1). The command line prints the message as one line.
"""

from __future__ import annotations


class ExpungeError(Exception):
    """Something failed while working; the message says what and what to do next."""

    exit_code = 1


class UserError(ExpungeError):
    """The request cannot be carried out as given; nothing was computed or written."""

    exit_code = 2


class SettingError(UserError):
    """A setting is unknown, of the wrong type, or out of its range."""


class RequestError(UserError):
    """A request names nothing, names what the data lacks, or covers all data."""


class DataError(UserError):
    """Data cannot be read, holds NaN, or does not fit the model."""


class ModelError(UserError):
    """A model cannot be read or does not fit the data."""


class NeedsError(UserError):
    """A method or audit needs something this problem or request does not have."""


class StoreError(UserError):
    """A store cannot be opened, or holds no such run."""


class AccessError(ExpungeError):
    """A method touched something it had not declared in its needs."""


class UnchangedError(ExpungeError):
    """A method returned the original weights although it did not declare that it may."""


class Interrupted(ExpungeError):
    """Work was stopped on purpose; what was checkpointed can be resumed."""

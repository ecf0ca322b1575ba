"""What the readers of foreign files share: quiet imports of big packages, errors in one line."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expunge.core.errors import ModelError, UserError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, log lines and progress bars of transformers and its kin off stderr.

    Works on the whole process, as logging and warnings do; meant for short calls.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def need(package: str, extra: str = "vision") -> Any:
    """Import a package of an extra.

    Raises:
        UserError: it is not installed.
    """
    if package in sys.modules:
        return sys.modules[package]
    try:
        with quiet():
            return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{package} is not installed; pip install expunge[{extra}]") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no settings")
    return found

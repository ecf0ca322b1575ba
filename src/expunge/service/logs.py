"""Structured logs: one JSON object a line on standard error; never a selector or an id of a record."""

from __future__ import annotations

import logging
import sys
from typing import Any


def configure(level: str = "info", *, as_json: bool = True) -> None:
    """Send this process' events to standard error.

    Args:
        level: debug, info, warning or error.
        as_json: one object a line; words for people otherwise.
    """
    import structlog

    render: Any = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            getattr(logging, level.upper(), logging.INFO)
        ),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def logger() -> Any:
    """The service's logger: `logger().info("event", request=…)`."""
    import structlog

    return structlog.get_logger("expunge")


def quiet_dbos(level: int = logging.ERROR) -> None:
    """Let the workflow engine speak of errors only; what it does is in the service's own events."""
    logging.getLogger("dbos").setLevel(level)

"""Who may call: anybody on this machine, or whoever holds the token; never the network without one."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import stat
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from expunge.core.errors import UserError

TOKEN = "EXPUNGE_TOKEN"
"""Environment variable with the token."""
SHORTEST = 16
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""What proxies add: whoever called them may be anywhere, though they call from this machine."""
OPEN = frozenset({"/health", "/ready"})
"""Paths that say nothing about anybody."""


def is_loopback(host: str) -> bool:
    """Whether an address, or the host of a URL, is this machine and no other."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def token_from(file: str | None) -> str | None:
    """The token from a file that only its owner may read, or from the environment.

    Raises:
        UserError: the file cannot be read, others may read it, or the token is short.
    """
    if file is not None:
        path = Path(file).expanduser()
        try:
            mode, token = path.stat().st_mode, path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the token in {path}: {error}") from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"others may read the token in {path}; say chmod 600 {path}")
    else:
        token = os.environ.get(TOKEN, "").strip()
    if not token and file is None:
        return None
    if len(token) < SHORTEST:
        raise UserError(f"a token has {SHORTEST} characters at least")
    return token


def check_binding(host: str, token: str | None) -> None:
    """Refuse to listen where others can call without a token.

    Raises:
        UserError: the address is not loopback, and there is no token.
    """
    if token is None and not is_loopback(host):
        raise UserError(
            f"{host} can be reached from other machines; give a token with --token-file or ${TOKEN}"
        )


class TokenAuth:
    """ASGI middleware: with a token everybody needs it; without one only this machine is let in."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        """Keep a digest of the token, so that comparing takes the same time for every guess."""
        self.app = app
        self._digest = None if token is None else _digest(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or pass on."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        refused = self._refuse(scope)
        if refused is None:
            await self.app(scope, receive, send)
            return
        await refused(scope, receive, send)

    def _refuse(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if self._digest is not None:
            kind, _, given = headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(_digest(given.strip()), self._digest)
            return None if known and kind.lower() == "bearer" else _unauthorised()
        client = scope.get("client")
        if client is None or not is_loopback(client[0]) or any(h in headers for h in FORWARDED):
            return _unauthorised()
        # a page in a browser of this machine must not speak to us under a name of its own
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if host and not is_loopback(_name("//" + host)):
            return _answer(403, "without a token only addresses of this machine are served")
        if origin and not is_loopback(_name(origin)):
            return _answer(403, "pages of other addresses may not call this service")
        return None


def _name(address: str) -> str:
    """The host in an address; empty if it cannot be read."""
    try:
        found = re.fullmatch(r"(\[[^\]]*\]|[^][:@]*)(:[0-9]*)?", urlsplit(address).netloc)
    except ValueError:
        return ""
    return "" if found is None else found[1]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _unauthorised() -> JSONResponse:
    return JSONResponse(
        {"detail": "a bearer token is needed"}, 401, headers={"WWW-Authenticate": "Bearer"}
    )


def _answer(status: int, text: str) -> JSONResponse:
    return JSONResponse({"detail": text}, status)

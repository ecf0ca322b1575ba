"""E-mail addresses, IP addresses and keys in texts and code, by pattern and entropy.

What looks like one and is a placeholder, a version, a local address, a hash or a word is left out. Where
the package detect-secrets is installed (`pip install 'expunge[secrets]'`), what its detectors find counts
as a candidate key too.
"""

from __future__ import annotations

import functools
import importlib.util
import ipaddress
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from expunge.core.errors import SettingError

Tag = Literal["email", "ip", "key"]
TAGS: tuple[Tag, ...] = ("email", "ip", "key")
COLUMN = "secrets"
"""Column with the number of hits in a record, for `where="secrets > 0"`."""
BITS_BASE64, BITS_HEX, SHARE = 4.25, 2.75, 0.85
"""Least entropy of a key's characters, in bits a character; of few characters a share of the most possible."""


@dataclass(frozen=True)
class Secret:
    """A hit: its kind, the text itself, and where it lies, in characters."""

    tag: Tag
    value: str
    start: int
    end: int


def find_secrets(text: str, tags: Sequence[str] = TAGS) -> list[Secret]:
    """Sensitive segments of a text, in order; none overlaps another.

    Args:
        text: prose or code.
        tags: kinds to look for, of `TAGS`.

    Raises:
        SettingError: there is no such kind.
    """
    unknown = [tag for tag in tags if tag not in TAGS]
    if unknown:
        raise SettingError(f"there is no kind {unknown[0]!r} of secrets; use {', '.join(TAGS)}")
    found: list[Secret] = []
    looked = [_FINDERS[tag](text) for tag in TAGS if tag in tags]
    for hit in itertools.chain.from_iterable(looked):
        if not any(hit.start < other.end and other.start < hit.end for other in found):
            found.append(hit)
    return sorted(found, key=lambda hit: hit.start)


def mark_secrets(
    records: Iterable[Mapping[str, Any]], tags: Sequence[str] = TAGS
) -> list[dict[str, Any]]:
    """Give records the `spans` of what is found in them, and a column `secrets` that counts them.

    Args:
        records: as `encode` takes them. A `text` is looked through, or an `answer`; of chats nothing
            is. Spans that are there stay.
        tags: kinds to look for.

    Returns:
        New records.
    """
    found = []
    for record in records:
        text = record.get("text", record.get("answer"))
        hits = find_secrets(text, tags) if isinstance(text, str) else []
        spans = sorted(
            {(h.start, h.end) for h in hits} | {(s[0], s[1]) for s in record.get("spans") or ()}
        )
        found.append({
            **record,
            COLUMN: len(spans),
            **({"spans": [list(s) for s in spans]} if spans else {}),
        })
    return found


# ------------------------------------------------------------------ addresses

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"
)
_V4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)")
_V6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_NO_EMAIL = ("example", "test", "user", "aaa", "bbb", "ccc")
NEAR = 100
"""Characters around an address in which a word may say that it is none of a version."""


def _emails(text: str) -> Iterator[Secret]:
    for match in _EMAIL.finditer(text):
        if not any(word in match[0].lower() for word in _NO_EMAIL):
            yield Secret("email", match[0], *match.span())


def _addresses(text: str) -> Iterator[Secret]:
    for match in sorted([*_V4.finditer(text), *_V6.finditer(text)], key=lambda m: m.start()):
        around = text[max(0, match.start() - NEAR) : match.end() + NEAR].lower()
        if _is_public(match[0], around):
            yield Secret("ip", match[0], *match.span())


def _is_public(value: str, around: str) -> bool:
    try:
        address = ipaddress.ip_address(value)  # refuses 20.01.05.03, as dates are written
    except ValueError:
        return False
    if address.version == 6 and len(value) < 9:  # a slice, a scope, a time
        return False
    version = len(value) == 7 and not any(word in around for word in ("dns", "server"))
    return address.is_global and not version


# ------------------------------------------------------------------ keys

_VENDORS = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,82}|glpat-[\w-]{20}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,72}|AIza[\w-]{35}|ya29\.[\w-]{20,}"
    r"|[sr]k_live_[A-Za-z0-9]{16,99}|SK[0-9a-f]{32}|SG\.[\w-]{22}\.[\w-]{43}|key-[0-9a-f]{32}"
    r"|hf_[A-Za-z0-9]{30,40}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}|sk-[A-Za-z0-9_-]{32,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"  # JSON web tokens
    r")(?![A-Za-z0-9])"
)
_CANDIDATE = re.compile(
    r"(?:[\"'`]|[=:][ \t]*)([A-Za-z0-9+/_\-]{16,}={0,2})(?=[\"'`\s,;)\]}]|$)", re.MULTILINE
)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_ID = re.compile(r"(?:\b|_)[a-z]{0,6}ids?[^a-z0-9]{1,6}$", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"example|sample|dummy|fake|your|change.?me|placeholder|insert|redact|test|xxx|(.)\1{4}",
    re.IGNORECASE,
)
_HASH = re.compile(r"hash|\bsha\b|sha[-_]?\d", re.IGNORECASE)
_HASH_NEAR = re.compile(r"sha|md5|hash|byte", re.IGNORECASE)
_NO_PLUGINS = ("KeywordDetector", "BasicAuthDetector", "PrivateKeyDetector", "IPPublicDetector")


def _keys(text: str) -> Iterator[Secret]:
    lines = text.splitlines() or [""]
    if sum(bool(_HASH.search(line)) for line in lines) > 0.02 * len(lines):
        return
    spans = [match.span() for match in _VENDORS.finditer(text)]
    spans += [m.span(1) for m in _CANDIDATE.finditer(text) if _is_dense(m[1])]
    spans += _by_package(text)
    for start, end in spans:
        line_start = text.rfind("\n", 0, start) + 1
        line_end = text.find("\n", end)
        line = text[line_start : None if line_end < 0 else line_end]
        if _is_key(text[start:end], text[line_start:start], line):
            yield Secret("key", text[start:end], start, end)


def _is_dense(value: str) -> bool:
    """Whether a string has letters, digits and the entropy of random ones."""
    bare = value.rstrip("=")
    hexadecimal = re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", bare) is not None
    symbols, limit = (16, BITS_HEX) if hexadecimal else (64, BITS_BASE64)
    most = math.log2(min(len(bare), symbols))
    mixed = any(c.isdigit() for c in bare) and any(c.isalpha() for c in bare)
    return mixed and entropy(bare) >= min(limit, SHARE * most)


def _is_key(value: str, before: str, line: str) -> bool:
    digest = len(value) in (32, 40, 64) and _HASH_NEAR.search(line.replace(value, ""))
    templated = before.rstrip("\"'`")[-1:] in tuple("{<$%")
    return not (
        digest
        or templated
        or _UUID.fullmatch(value)
        or _ID.search(before)
        or _PLACEHOLDER.search(value)
        or _has_run(value)
        or not is_gibberish(value)
    )


def _has_run(value: str, length: int = 6) -> bool:
    """Whether so many characters follow one another as in the alphabet, up or down."""
    steps = [ord(b) - ord(a) for a, b in itertools.pairwise(value.lower())]
    runs = [(k, len(list(g))) for k, g in itertools.groupby(steps)]
    return any(step in (1, -1) and n >= length - 1 for step, n in runs)


def _by_package(text: str) -> list[tuple[int, int]]:
    """Spans that the detectors of detect-secrets find, its noisy ones left out; none without it."""
    if importlib.util.find_spec("detect_secrets") is None:
        return []
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import default_settings, transient_settings

    with default_settings():
        names = [c.__name__ for c in get_mapping_from_secret_type_to_class().values()]
    spans, start = [], 0
    with transient_settings({"plugins_used": [{"name": n} for n in names if n not in _NO_PLUGINS]}):
        for line in text.splitlines(keepends=True):
            for hit in scan_line(line):
                value = hit.secret_value or ""
                # without its limits for whole files it also names short hexadecimal words
                place = line.find(value) if len(value) >= 16 else -1
                if place >= 0:
                    spans.append((start + place, start + place + len(value)))
            start += len(line)
    return spans


def entropy(value: str) -> float:
    """Entropy of the characters of a string, in bits a character."""
    counts = Counter(value).values()
    return -sum(c / len(value) * math.log2(c / len(value)) for c in counts)


_WORDS = (
    "about access account action active address after again allow amount another application argument "
    "array available background base before between block board body border bottom break button byte "
    "cache call cancel change channel character check child class clean clear client close cloud code "
    "collection color column command comment common compare complete component condition config connect "
    "constant container content context control convert copy count country create current custom data "
    "database date debug decode default define delete describe detail device dictionary different direct "
    "disable display document domain double download driver dynamic edit element email enable encode end "
    "engine enter entry environment error event every example exception execute exist export extend "
    "factory false feature field file filter final find first flag float folder follow format forward "
    "frame from function general generate global graph great group handle header height hello hidden host "
    "image implement import include index information initial inner input insert install instance "
    "integer interface internal invalid item iterator java join keyboard label language large last layer "
    "layout left length level library light limit line link list listener little load local location lock "
    "login long loop machine main manager many map mask match matrix maximum media member memory message "
    "method middle minimum missing mode model module monitor more mouse move multiple music name native "
    "network never next node normal nothing notice number object offset only open operation option order "
    "other output package page panel parameter parent parse part password path pattern people percent "
    "permission person place player plugin point pointer policy position post power prepare previous "
    "print private process product profile program project property provider public push python query "
    "question queue random range read ready real receive record reference register release remote remove "
    "render repeat replace report request require reset resource response result return right root route "
    "row rule running sample save scale schedule schema screen script scroll search second section "
    "security select send sequence server service session setting shape share short show simple single "
    "size small socket sort sound source space special split stack standard start state static status "
    "stop storage store stream string structure style submit success support switch symbol system table "
    "target task template terminal text theme there thing thread through time title token tool total "
    "track train transaction transform tree trigger true type under unique unit unknown until update "
    "upload user utility valid validate value variable vector version very video view virtual visible "
    "wait warning watch water weight where which while widget width window with without word work world "
    "would wrapper write year zero singleton proxy abstract bean"
)
LIKELY = -4.4
"""Mean log2 p of a word's pairs is above; of 40 random letters and digits it is below in 999 of 1,000."""


@functools.cache
def _pairs() -> dict[str, float]:
    """log2 p(second letter | first) from common words, with one added to each count."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    counts = Counter(a + b for word in _WORDS.split() for a, b in itertools.pairwise(word))
    totals = {a: sum(counts[a + b] + 1 for b in letters) for a in letters}
    return {a + b: math.log2((counts[a + b] + 1) / totals[a]) for a in letters for b in letters}


def is_gibberish(value: str) -> bool:
    """Whether the pairs of neighbouring letters of a string are those of no word."""
    if sum(c.isdigit() for c in value) > 0.3 * len(value):
        return True
    pairs = [a + b for a, b in itertools.pairwise(value.lower())]
    known = [_pairs()[pair] for pair in pairs if pair in _pairs()]
    return len(known) < 4 or sum(known) / len(known) < LIKELY


_FINDERS = {"email": _emails, "ip": _addresses, "key": _keys}

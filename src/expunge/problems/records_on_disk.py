"""A user's own texts, questions or chats in `.jsonl` files, with a language model on disk or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from expunge.core.errors import DataError, SettingError, UserError
from expunge.core.problem import Recipe
from expunge.core.request import Request
from expunge.core.request import forget as make
from expunge.problems._foreign import first_line
from expunge.problems.causal_lm import CausalLM
from expunge.problems.encoding import FORMS, Long, encode
from expunge.problems.lm_on_disk import BUNDLED, lm_folder, load_lm
from expunge.problems.secrets import mark_secrets
from expunge.problems.tokens import TokenData

PART = "part"
"""Column that says which file a sample is from: `forget` or `retain`."""
FORGET = f"{PART} == 'forget'"
LONG = ("error", "cut", "split")
SECRETS = ("given", "detect")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read one JSON object a line.

    Raises:
        DataError: the file cannot be read, is empty, or a line is no object.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number} is no object with text, question or messages")
        records.append(record)
    if not records:
        raise DataError(f"{path} holds no records")
    return records


def holds_records(path: str | Path | None) -> bool:
    """Whether a file's first line is a record of a language model's data."""
    if path is None or Path(path).suffix != ".jsonl":
        return False
    try:
        with Path(path).expanduser().open(encoding="utf-8-sig") as file:
            record = json.loads(next((line for line in file if line.strip()), "null"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and any(keys[0] in record for keys in FORMS.values())


def lm_from_disk(
    model: str,
    *,
    forget: str | None = None,
    retain: str | None = None,
    data: str | None = None,
    test: str | None = None,
    recipe: Recipe | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    max_length: int | None = None,
    long: str = "error",
    chat: bool = False,
    secrets: str = "given",
    packing: bool = False,
) -> CausalLM:
    """Put a language model and records together, and look at all of it once.

    Args:
        model: what `load_lm` takes.
        forget: `.jsonl` of the records to forget; `retain` holds the others. Together they are the
            training data, with a column `part` that says which is which.
        retain: `.jsonl` of the records to keep.
        data: instead of both, one `.jsonl` with all training data.
        test: `.jsonl` of held-out records.
        recipe: how the model was trained, for retrained references.
        dtype: of the weights, see `load_lm`.
        revision: branch, tag or commit on the hub.
        max_length: largest number of tokens of a sample; the model's context if longer ones are to be
            cut or split.
        long: what happens to longer ones, see `encode`.
        chat: whether questions go into the chat template.
        secrets: sensitive segments that are marked: those `given` by a record's `secret` or `spans`,
            or those that `detect` finds too (see `secrets.py`).
        packing: ask the model for a batch without its padding, see `CausalLM`.

    Returns:
        The problem; its `source` says how to build it again.

    Raises:
        ModelError: the model cannot be read.
        DataError: the data cannot be read, or does not fit the model.
        SettingError: `long` or `secrets` is no choice.
        UserError: neither `data` nor both of the others were given.
    """
    if long not in LONG:
        raise SettingError(f"long={long!r} is not a choice; use {', '.join(LONG)}")
    if secrets not in SECRETS:
        raise SettingError(f"secrets={secrets!r} is not a choice; use {' or '.join(SECRETS)}")
    given = (forget is not None, retain is not None, data is not None)
    if given not in ((True, True, False), (False, False, True)):
        raise UserError(
            "a language model's data are --forget and --retain with records, or --data with records "
            "and what to forget of them"
        )
    files: dict[str, str | None] = {"data": data}
    if data is None:
        files = {"forget": forget, "retain": retain}
    records = {part: read_records(str(path)) for part, path in files.items()}  # before the model
    held_out = None if test is None else read_records(test)
    if secrets == "detect":
        records = {part: mark_secrets(rows) for part, rows in records.items()}
        held_out = None if held_out is None else mark_secrets(held_out)
    network, tokenizer = load_lm(model, dtype, revision)
    if max_length is None and long != "error":
        max_length = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    more: dict[str, Any] = {"max_length": max_length, "long": cast(Long, long), "chat": chat}
    if data is None:
        records = {k: [r | {PART: k} for r in rows] for k, rows in records.items()}
    problem = CausalLM(
        network,
        _encode(records, files, tokenizer, more),
        None if held_out is None else _encode({"test": held_out}, {"test": test}, tokenizer, more),
        tokenizer=tokenizer,
        packing=packing,
        recipe=recipe,
        name=Path(model).expanduser().resolve().name if Path(model).exists() else model,
        source={
            "kind": "causal-lm",
            "model": _absolute(model) if Path(model).expanduser().exists() else model,
            "revision": _commit(model, revision),
            **{k: _absolute(files.get(k)) for k in ("forget", "retain", "data")},
            "test": _absolute(test),
            "dtype": dtype,
            **more,
            **({"secrets": secrets} if secrets != "given" else {}),
            **({"packing": True} if packing else {}),
        },
    )
    problem.check()
    problem.fingerprint()
    return problem


def request_for(records: str, retain: str | None) -> Request:
    """The request for a file of records to forget.

    Raises:
        UserError: there is no file of records to keep.
    """
    if retain is None:
        raise UserError(f"{records} holds records to forget; give those to keep with --retain")
    return make(where=FORGET)


def _encode(
    records: dict[str, list[dict[str, Any]]],
    files: dict[str, str | None],
    tokenizer: Any,
    more: dict[str, Any],
) -> TokenData:
    try:
        return encode([r for rows in records.values() for r in rows], tokenizer, **more)
    except DataError as error:
        for part, rows in records.items():  # the count of records begins anew in each file
            try:
                encode(rows, tokenizer, **more)
            except DataError as own:
                raise DataError(f"{files[part]}: {own}") from own
        raise DataError(f"{' and '.join(map(str, files.values()))}: {error}") from error


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _commit(model: str, revision: str | None) -> str | None:
    """The commit a hub model was read from, so that a record means the same later."""
    if model in BUNDLED or Path(model).expanduser().exists():
        return None
    folder = lm_folder(model, revision)
    return folder.name if folder.parent.name == "snapshots" else revision

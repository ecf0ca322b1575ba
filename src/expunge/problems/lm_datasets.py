"""Rows of TOFU, MUSE, WMDP and RESTOR, from the hub, or from files of one's own with the same columns.

A source is the name of a data set on the hub, a file (JSON lines, JSON, Parquet, CSV), or a folder. In a folder
the rows of a configuration and split are looked for as `CONFIG/SPLIT.jsonl`, `CONFIG.json` and the like, as the
shards of a copied hub repository, and as what `datasets` wrote with `save_to_disk`. Files need no network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.core.errors import DataError
from expunge.problems._foreign import first_line, need, quiet
from expunge.problems.datasets_folder import is_datasets_folder

Record = dict[str, Any]
_READERS = {
    ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv",
}  # fmt: skip
_MUSE_COLUMNS = {
    "verbmem": ("prompt", "gt"),
    "knowmem": ("question", "answer"),
}
_OLD_SPLITS = {"retain_qa": "retain2_qa", "retain": "retain2", "retain_qa_icl": "retain2_qa_icl"}


@dataclass(frozen=True)
class Restor:
    """Facts of RESTOR.

    Attributes:
        facts: `facts[entity][property]` is `{question, answers}`.
        context: solved examples `{question, answer, entity}` by property; they may be missing.
        corrupted: wrong answers, laid out as the facts; they may be missing.
        documents: records `{text}` that state the wrong ones.
    """

    facts: Mapping[str, Mapping[str, Any]]
    context: Mapping[str, Sequence[Record]]
    corrupted: Mapping[str, Mapping[str, Any]]
    documents: list[Record]

    def questions(self) -> list[Record]:
        """One record for each fact: question, answer (the first accepted one), answers, entity, property."""
        return [
            {
                "question": fact["question"], "answer": str(fact["answers"][0]),
                "answers": [str(a) for a in fact["answers"]], "entity": entity, "property": name,
            }
            for entity, properties in self.facts.items()
            for name, fact in properties.items()
        ]  # fmt: skip


def load_tofu(source: str | Path = "locuslab/TOFU", config: str = "full") -> list[Record]:
    """Questions and answers of TOFU.

    Args:
        source: hub name, file or folder.
        config: `full`, `forget10`, `retain90`, `forget10_perturbed`, `real_authors_perturbed`, …

    Returns:
        Records with `question` and `answer`; of a perturbed configuration also the paraphrase, where
        there is one, and `perturbed_answer`, which stands as `alternate` too.

    Raises:
        DataError: they cannot be read, or columns are missing.
    """
    columns = ["question", "answer"]
    if config.endswith("_perturbed"):
        columns += ["perturbed_answer"]
        if not config.startswith(("real_authors", "world_facts")):
            columns += ["paraphrased_question", "paraphrased_answer"]
    rows = read_rows(source, config, "train", columns)
    return [
        row | ({"alternate": list(row["perturbed_answer"])} if "perturbed_answer" in row else {})
        for row in rows
    ]


def load_muse(
    source: str | Path = "muse-bench/MUSE-News", config: str = "raw", split: str = "forget"
) -> list[Record]:
    """Texts or questions of MUSE.

    Args:
        source: hub name, file or folder.
        config: raw, train, scal, sust or privleak (records with `text`), verbmem (`prompt`, `gt`) or
            knowmem (`question`, `answer`).
        split: forget, retain1, retain2, holdout, forget_1 …, forget_qa, retain_qa, …; `retain2_qa` and
            `retain2` of old revisions are found by their new names.

    Returns:
        The records.

    Raises:
        DataError: they cannot be read, or columns are missing.
    """
    columns = _MUSE_COLUMNS.get(config, ("text",))
    try:
        return read_rows(source, config, split, columns)
    except _NoSplitError:
        if split not in _OLD_SPLITS:
            raise
        return read_rows(source, config, _OLD_SPLITS[split], columns)


def load_wmdp(source: str | Path = "cais/wmdp", config: str = "wmdp-bio") -> list[Record]:
    """Four-option questions of WMDP, or the rows with `text` of a corpus that belongs to it.

    Args:
        source: hub name, file or folder. Nothing is fetched unless it is asked for by name.
        config: wmdp-bio, wmdp-cyber or wmdp-chem; a name with `corpus` reads texts of the split `train`.

    Returns:
        Records with `question`, `choices` (four texts), `correct` (0 … 3) and the right choice as
        `answer`, the others as `alternate`; or records with `text`.

    Raises:
        DataError: they cannot be read, columns are missing, or an answer is not one of four choices.
    """
    if "corpus" in config:
        return read_rows(source, config, "train", ("text",))
    found = []
    for place, row in enumerate(
        read_rows(source, config, "test", ("question", "choices", "answer"))
    ):
        choices, correct = [str(c) for c in row["choices"]], row["answer"]
        if len(choices) != 4 or correct not in range(4):
            raise DataError(
                f"row {place} of {source} needs 4 choices and an answer from 0 to 3; it has "
                f"{len(choices)} and {correct!r}"
            )
        wrong = choices[: int(correct)] + choices[int(correct) + 1 :]
        found.append(
            row | {"choices": choices, "correct": int(correct), "answer": choices[int(correct)]}
            | {"alternate": wrong}
        )  # fmt: skip
    return found


def load_restor(folder: str | Path, documents: str | None = None) -> Restor:
    """Facts and corruption documents of RESTOR, from its released files.

    Args:
        folder: with `facts.json`, and `context.json` and `corrupted.json` if there are such.
        documents: file of the documents in the folder; `documents.jsonl` when left out.

    Returns:
        The facts.

    Raises:
        DataError: a file cannot be read, or a fact has no question or no answers.
    """
    place = Path(folder)
    facts = _object(place / "facts.json")
    for entity, properties in facts.items():
        for name, fact in properties.items() if isinstance(properties, dict) else [("", None)]:
            if not isinstance(fact, dict) or not fact.get("question") or not fact.get("answers"):
                raise DataError(
                    f"{place / 'facts.json'}: {entity} {name} needs a `question` and `answers`"
                )
    more = {
        name: _object(place / f"{name}.json") if (place / f"{name}.json").exists() else {}
        for name in ("context", "corrupted")
    }
    rows = read_rows(place / (documents or "documents.jsonl"), "", "train", ("text",))
    return Restor(facts, more["context"], more["corrupted"], rows)


def read_rows(source: str | Path, config: str, split: str, columns: Sequence[str]) -> list[Record]:
    """Rows of a configuration and split.

    Args:
        source: hub name, file or folder.
        config: name of the configuration; empty for a file or folder without any.
        split: name of the part.
        columns: that must be there.

    Returns:
        Rows with all of their columns, in order.

    Raises:
        DataError: they cannot be found, fetched or read, or columns are missing.
    """
    place = Path(source)
    if place.exists():
        rows = _local(place, config, split)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not place.suffix:
        rows = _hub(str(source), config, split)
    else:
        raise DataError(f"there is no file or folder {source}")
    if not rows:
        raise DataError(f"{source} holds no rows of {_part(config, split)}")
    missing = [c for c in columns if any(row.get(c) is None for row in rows)]
    if missing:
        raise DataError(
            f"{source} lacks {', '.join(f'`{c}`' for c in missing)} in {_part(config, split)}; its "
            f"columns are {', '.join(rows[0])}"
        )
    return rows


class _NoSplitError(DataError):
    """A source has no such part."""


def _local(place: Path, config: str, split: str) -> list[Record]:
    datasets = need("datasets")
    for folder in (place / config, place) if place.is_dir() else ():
        if is_datasets_folder(folder):
            with quiet():
                found = datasets.load_from_disk(str(folder))
            if isinstance(found, dict) and split not in found:
                raise _NoSplitError(f"{folder} has no part {split!r}; it has {', '.join(found)}")
            return list(found[split] if isinstance(found, dict) else found)
    files = [place] if place.is_file() else _files(place, config, split)
    if not files:
        raise _NoSplitError(
            f"{place} holds no rows of {_part(config, split)}; they would lie in "
            f"{Path(config) / (split + '.jsonl')}, or .json, .parquet or .csv"
        )
    if files[0].suffix not in _READERS:
        raise DataError(f"{files[0]} is no JSON lines, JSON, Parquet or CSV file")
    try:
        with quiet():
            found = datasets.load_dataset(
                _READERS[files[0].suffix], data_files=[str(f) for f in files], split="train",
                streaming=True,  # nothing of one's own files is copied into a cache
            )  # fmt: skip
            return [dict(row) for row in found]
    except Exception as error:  # Arrow, JSON and OS errors alike
        raise DataError(f"{files[0]} cannot be read ({first_line(error)})") from error


def _files(place: Path, config: str, split: str) -> list[Path]:
    """Files of a part: `CONFIG/SPLIT*`, `CONFIG_SPLIT`, `CONFIG` or `SPLIT`, the first that there are."""
    known = sorted(p for p in place.rglob("*") if p.suffix in _READERS)
    stems = [(f"{config}/{split}", True), (f"{config}_{split}", False), (config, False)]
    if not config:
        stems = [(split, True)]
    for stem, shards in stems:
        pattern = re.escape(stem) + (r"(-\d+-of-\d+)?" if shards else "")
        found = [
            p
            for p in known
            if re.fullmatch(pattern, p.relative_to(place).with_suffix("").as_posix())
        ]
        if found:
            # one format, where the same rows lie there in two
            return [p for p in found if p.suffix == found[0].suffix]
    return []


def _hub(name: str, config: str, split: str) -> list[Record]:
    datasets = need("datasets")
    try:
        with quiet():
            return list(datasets.load_dataset(name, config or None, split=split))
    except ValueError as error:
        if "split" in str(error).lower():
            raise _NoSplitError(f"{name} has no {_part(config, split)}") from error
        raise DataError(f"{name} has no {_part(config, split)} ({first_line(error)})") from error
    except Exception as error:  # network, hub and access errors alike
        raise DataError(
            f"{name} is neither a folder here nor can it be fetched from the hub "
            f"({first_line(error)}); without a network give a folder with "
            f"{Path(config) / (split + '.jsonl')}"
        ) from error


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold one JSON object")
    return found


def _part(config: str, split: str) -> str:
    return f"part {split!r}" + (f" of {config!r}" if config else "")

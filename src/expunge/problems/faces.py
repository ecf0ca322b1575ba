"""MUFAC and MUCAC: faces with a task label and an identity, read as their files lie on disk.

Choi and Na (2023), arXiv 2311.02240. The images are not free to be passed on: this is a reader, no download.
What is to be forgotten are people, whose labels are spread over all classes; nobody is in more than one of
training, test and unseen data. Images are scaled to 0 … 1 and not normalised, as in the published code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from expunge.core.data import Data
from expunge.core.errors import DataError, SettingError
from expunge.core.request import Request
from expunge.problems._foreign import first_line
from expunge.problems.image_table import lazy_images, present, table_rows
from expunge.problems.subjects import (
    UNSEEN,
    SubjectSplits,
    disjoint,
    warn_of_cuts,
    with_unseen,
)

AGES = ("0-6", "7-12", "13-19", "20-30", "31-45", "46-55", "56-66", "67-80")
"""Classes a … h of MUFAC, in years."""
TASKS = ("Male", "Smiling", "Young")
"""Questions of MUCAC; in the multi-label variant bit k of a label answers the k-th."""
TEST, FORGET, RETAIN = 190, 1250, 4855
"""MUCAC: ids below the first are tested on, then come those to forget, to retain, and unseen ones."""
_FORGET_ROWS = 1500
_MUFAC = {"train": "train", "test": "val", UNSEEN: "test"}
"""Names on disk: the table called *val* is the test set, the one called *test* the unseen people."""
_NAME = re.compile(r"(F\d+)_AGE_([^_]+)_(\d+)_([a-h])(\d+)\.\w+")

Task = Literal["multi-label", "Male", "Smiling", "Young"]


def mufac(
    folder: str | Path, *, forget: int = _FORGET_ROWS, whole: bool = False, size: int | None = 128,
    skip_missing: bool = False,
) -> SubjectSplits:  # fmt: skip
    """Read MUFAC: 13,068 faces of 900 families, the age in eight classes.

    The folder holds `custom_train_dataset.csv` (columns `image_path`, `age_class` in a … h) and
    `train_images/`, likewise `val` (the test set) and `test` (the unseen people). A file name such as
    `F0001_AGE_D_18_a1.jpg` says household, member, present age, and age class of the picture; the columns
    `identity` (household, member and present age), `household` and `member` are made of it.

    Args:
        folder: e.g. `custom_korean_family_dataset_resolution_128`.
        forget: how many rows of the training table, from the top, are to be forgotten.
        whole: let the cut go on to the end of the household that it would divide.
        size: length in pixels of the shorter edge; None leaves the images as they are.
        skip_missing: leave rows out whose image is not there, with a warning.

    Returns:
        The splits. The request is a condition on row numbers, which are the ids of the training data.

    Raises:
        DataError: files are missing or say something else, or a household is in two of the three parts.
        SettingError: no row, or every row, would be forgotten.
    """
    root = Path(folder).expanduser()
    parts = {
        part: _mufac_part(root, name, size, skip_missing=skip_missing)
        for part, name in _MUFAC.items()
    }
    disjoint({part: d.columns["household"] for part, d in parts.items()}, "household")
    train = parts["train"]
    if not 0 < forget < len(train):
        raise SettingError(f"forget={forget} of {len(train)} rows is none or too many")
    households = train.columns["household"]
    taken = (train.ids < forget).numpy()  # a row that is left out keeps its number
    if whole:
        taken = np.isin(households, households[taken])
        if taken.all():
            raise SettingError("whole households would be all of the training data")
        request = Request(ids=tuple(train.ids[torch.from_numpy(taken)].tolist()))
    else:
        warn_of_cuts({"forget": households[taken], "retain": households[~taken]}, "household")
        request = Request(where=f"id < {forget}")
    test = _both(root, parts["test"], parts[UNSEEN], ("identity", "household", "member"), size)
    return SubjectSplits(train, test, request, AGES)


def mucac(
    folder: str | Path, *, task: Task = "multi-label", size: int | None = 128,
    skip_missing: bool = False,
) -> SubjectSplits:  # fmt: skip
    """Read MUCAC: the 30,000 faces of CelebA-HQ with 6,217 identities, three questions each.

    The folder holds `CelebAMask-HQ/CelebA-HQ-img/*.jpg`, `CelebA-HQ-identity.txt` (file and identity a
    line) and `CelebA-HQ-attribute.txt` (a count, the names of the attributes, then file and 1 or −1 for each).

    Args:
        folder: where the three are; the tables may also lie in `CelebAMask-HQ`.
        task: one question, or all three in one label (for `MultiLabel`), see `TASKS`.
        size: length in pixels of the shorter edge; None leaves the images as they are.
        skip_missing: leave images out that are not there, with a warning.

    Returns:
        The splits, by the number of the identity; the request names those to forget.

    Raises:
        DataError: files are missing or say something else, or a side is empty.
        SettingError: there is no such task.
    """
    if task not in ("multi-label", *TASKS):
        raise SettingError(f"task must be multi-label or one of {', '.join(TASKS)}, not {task!r}")
    root = Path(folder).expanduser()
    owner = _identities(_table(root, "CelebA-HQ-identity.txt"))
    answers = _attributes(_table(root, "CelebA-HQ-attribute.txt"))
    lacking = next((name for name in owner if name not in answers), None)
    if lacking is not None:
        raise DataError(f"{root}: {lacking} has an identity but no attributes")
    images = root / "CelebAMask-HQ" / "CelebA-HQ-img"
    names = list(owner)
    there = present(images, names, "CelebA-HQ-identity.txt", skip=skip_missing)
    who = np.asarray([owner[names[i]] for i in there])
    bits = np.asarray([answers[names[i]] for i in there])
    labels = (
        bits @ (1 << np.arange(len(TASKS))) if task == "multi-label" else bits[:, TASKS.index(task)]
    )
    held = (who < TEST) | (who >= RETAIN)

    def some(mask: np.ndarray) -> Data:
        at = np.flatnonzero(mask)
        columns: dict[str, list[int]] = {"identity": who[at].tolist()}
        columns |= {t: bits[at, k].tolist() for k, t in enumerate(TASKS)}
        if mask is held:
            columns[UNSEEN] = (who[at] >= RETAIN).astype(int).tolist()
        return lazy_images(
            images, [names[there[i]] for i in at], torch.from_numpy(labels[at]),
            ids=[there[i] for i in at], columns=columns, size=size,
        )  # fmt: skip

    sides = {"test": who < TEST, "forget": (who >= TEST) & (who < FORGET), "retain": (who >= FORGET) & (who < RETAIN), UNSEEN: who >= RETAIN}  # fmt: skip
    empty = next((side for side, mask in sides.items() if not mask.any()), None)
    if empty is not None:
        raise DataError(f"{root}: there is no image for the side {empty!r}")
    classes = TASKS if task == "multi-label" else (f"not {task}", task)
    return SubjectSplits(some(~held), some(held), Request(where=f"identity < {FORGET}"), classes)


def _mufac_part(root: Path, name: str, size: int | None, *, skip_missing: bool) -> Data:
    table = root / f"custom_{name}_dataset.csv"
    rows = table_rows(table, ("image_path", "age_class"))
    known = {letter: number for number, letter in enumerate("abcdefgh")}
    facts: dict[str, list[str]] = {"identity": [], "household": [], "member": []}
    for row in rows:
        found = _NAME.fullmatch(row["image_path"])
        if found is None:
            raise DataError(
                f"{table}: {row['image_path']} is not named as F0001_AGE_D_18_a1.jpg is"
            )
        if row["age_class"] not in known:
            raise DataError(f"{table}: age class {row['age_class']!r} is none of a … h")
        household, member, age, *_ = found.groups()
        facts["identity"].append(f"{household}_{member}_{age}")
        facts["household"].append(household)
        facts["member"].append(member)
    files = [f"{name}_images/{row['image_path']}" for row in rows]
    there = present(root, files, table.name, skip=skip_missing)
    labels = torch.tensor([known[rows[i]["age_class"]] for i in there])
    columns = {c: [values[i] for i in there] for c, values in facts.items()}
    return lazy_images(
        root, [files[i] for i in there], labels, ids=there, columns=columns, size=size
    )


def _both(root: Path, test: Data, unseen: Data, columns: tuple[str, ...], size: int | None) -> Data:
    """Two data sets of images below one folder as one, under new ids."""
    held, labels = with_unseen(test, unseen, columns)
    names = [*(test.names or []), *(unseen.names or [])]
    return lazy_images(root, names, labels, ids=range(len(names)), columns=held, size=size)


def _table(root: Path, name: str) -> list[str]:
    for place in (root / name, root / "CelebAMask-HQ" / name):
        if place.is_file():
            try:
                return place.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{place} cannot be read ({first_line(error)})") from error
    raise DataError(f"there is no {name} in {root}")


def _identities(lines: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for number, words in enumerate((line.split() for line in lines), 1):
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit():
            raise DataError(f"CelebA-HQ-identity.txt: line {number} is not a file and an identity")
        found[words[0]] = int(words[1])
    return found


def _attributes(lines: list[str]) -> Mapping[str, list[int]]:
    """Answers 0 and 1 to the questions of `TASKS` by file; −1 means no."""
    header = lines[1].split() if len(lines) > 1 else []
    if not set(TASKS) <= set(header):
        raise DataError(
            f"CelebA-HQ-attribute.txt: the second line does not name {', '.join(TASKS)}"
        )
    places = [header.index(t) + 1 for t in TASKS]  # the file comes first
    found = {}
    for number, words in enumerate((line.split() for line in lines[2:]), 3):
        if not words:
            continue
        if len(words) != len(header) + 1 or any(words[p] not in ("1", "-1") for p in places):
            raise DataError(f"CelebA-HQ-attribute.txt: line {number} does not fit its header")
        found[words[0]] = [int(words[p] == "1") for p in places]
    return found

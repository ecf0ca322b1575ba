"""problems/faces.py and image_table.py: the layout on disk, the names that mislead, nobody on two sides."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
import torch
from small_faces import HOUSEHOLDS, NAMES, PEOPLE, write_mucac, write_mufac

import expunge as xp
from expunge.core.errors import DataError, SettingError
from expunge.problems.faces import AGES, TASKS, mucac, mufac
from expunge.problems.image_table import read_image_table
from expunge.problems.subjects import CutWarning, split_subjects

HEADERS = {"image": "image_path", "label": "age_class"}


@pytest.fixture(scope="module")
def korea(tmp_path_factory):
    return write_mufac(tmp_path_factory.mktemp("mufac"))


@pytest.fixture(scope="module")
def celebrities(tmp_path_factory):
    return write_mucac(tmp_path_factory.mktemp("mucac"))


def households(data, rows=None):
    values = data.columns["household"]
    return set((values if rows is None else values[rows]).tolist())


def test_mufac_invariant_2_nobody_is_on_two_sides(korea):
    splits = mufac(korea, forget=12, size=None)
    assert splits.sizes() == {"forget": 12, "retain": 24, "test": 12, "unseen": 12}
    forget = splits.request.resolve(splits.train)
    assert set(forget.tolist()) | set(splits.train.without(forget).tolist()) == set(range(36))
    unseen = splits.test.columns["unseen"] == 1
    sides = [households(splits.train), households(splits.test, ~unseen), households(splits.test, unseen)]  # fmt: skip
    assert not any(a & b for i, a in enumerate(sides) for b in sides[i + 1 :])
    assert splits.classes == AGES and len(AGES) == 8


def test_the_table_called_val_is_the_test_set(korea):
    splits = mufac(korea, forget=12, size=None)
    unseen = splits.test.columns["unseen"] == 1
    assert households(splits.test, ~unseen) == {f"F{h:04}" for h in HOUSEHOLDS["val"]}
    assert households(splits.test, unseen) == {f"F{h:04}" for h in HOUSEHOLDS["test"]}
    for name, marked in zip(splits.test.names, unseen, strict=True):
        assert name.startswith("test_images/" if marked else "val_images/")


def test_labels_identities_and_pixels_are_those_of_the_files(korea):
    from PIL import Image

    splits = mufac(korea, forget=12, size=None)
    for data in (splits.train, splits.test):
        batch = data.fetch(data.ids)
        for i, name in enumerate(data.names):
            household, member, age, letter = re.search(
                r"(F\d+)_AGE_(\w)_(\d+)_(\w)\d", name
            ).groups()
            assert int(batch.y[i]) == "abcdefgh".index(letter)
            assert data.columns["identity"][i] == f"{household}_{member}_{age}"
            assert data.columns["household"][i] == household
            pixels = np.asarray(Image.open(korea / name)).astype(np.float32) / 255
            assert torch.allclose(batch.x[i], torch.from_numpy(pixels).permute(2, 0, 1))
    assert mufac(korea, forget=12).train.fetch(torch.tensor([0])).x.shape == (1, 3, 128, 128)


def test_a_cut_through_a_household_is_said(korea):
    with pytest.warns(CutWarning, match=r"1 household \(F0003\) is divided between forget and retain"):  # fmt: skip
        cut = mufac(korea, forget=14, size=None)
    assert cut.sizes()["forget"] == 14
    assert households(cut.train, cut.request.resolve(cut.train).numpy()) == {"F0001", "F0002", "F0003"}  # fmt: skip
    whole = mufac(
        korea, forget=14, whole=True, size=None
    )  # without a warning, which would be an error
    assert whole.sizes()["forget"] == 18
    for wrong in (0, 36, 40):
        with pytest.raises(SettingError, match="none or too many"):
            mufac(korea, forget=wrong, size=None)
    with pytest.raises(SettingError, match="all of the training data"):
        mufac(korea, forget=32, whole=True, size=None)


def changed(root, name, change):
    path = root / f"custom_{name}_dataset.csv"
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    change(rows)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_what_is_wrong_with_the_files_is_said(tmp_path):
    def broken(change, match, name="train"):
        root = write_mufac(tmp_path / re.sub(r"\W", "", match))
        changed(root, name, change)
        with pytest.raises(DataError, match=match):
            mufac(root, forget=12, size=None)
        return root

    def call(at, value):
        return lambda rows: rows[3].__setitem__(at, value)

    broken(call(1, "i"), "age class 'i' is none of a … h")
    broken(call(0, "face7.jpg"), "face7.jpg is not named as")
    broken(call(0, "F0001_AGE_Z_1_a1.jpg"), "1 of the 36 images .* are not in")
    broken(lambda rows: rows[0].__setitem__(1, "age"), "no column 'age_class'")
    broken(lambda rows: rows[5].pop(), "row 6 has more or fewer values")
    broken(lambda rows: rows.append(rows[1]), "names .* twice")
    with pytest.raises(DataError, match="cannot be read as a table"):
        mufac(tmp_path / "nowhere")


def test_a_household_in_two_tables_is_refused(tmp_path):
    root = write_mufac(tmp_path)
    (root / "test_images" / "F0001_AGE_F_44_a9.jpg").write_bytes(
        next((root / "train_images").iterdir()).read_bytes()
    )
    changed(root, "test", lambda rows: rows.append(["F0001_AGE_F_44_a9.jpg", "a", "F0001"]))
    with pytest.raises(DataError, match="household F0001 is in both train and unseen"):
        mufac(root, forget=12, size=None)


def test_missing_images_are_left_out_only_when_asked_for(tmp_path):
    root = write_mufac(tmp_path)
    lost = (root / "custom_train_dataset.csv").read_text().splitlines()[1].split(",")[0]
    (root / "train_images" / lost).unlink()
    with pytest.raises(DataError, match=r"1 of the 36 images .*skip_missing=True"):
        mufac(root, forget=12, size=None)
    with pytest.warns(UserWarning, match="they are left out"):
        splits = mufac(root, forget=12, size=None, skip_missing=True)
    # the forget set is still the first twelve rows of the table, one of which is not there
    assert splits.sizes()["forget"] == 11 and splits.train.ids.tolist() == list(range(1, 36))


def test_mufac_invariant_2_mucac_splits_by_the_number_of_the_identity(celebrities):
    root, owners = celebrities
    splits = mucac(root, size=None)
    assert splits.sizes() == {"forget": 18, "retain": 18, "test": 6, "unseen": 18}
    assert len(owners) == sum(PEOPLE.values()) == 60
    forget = splits.request.resolve(splits.train)
    who = splits.train.columns["identity"]
    inside = torch.isin(splits.train.ids, forget).numpy()
    assert set(who[inside].tolist()) == {190, 700, 1249}
    assert set(who[~inside].tolist()) == {1250, 4854}
    unseen = splits.test.columns["unseen"] == 1
    held = splits.test.columns["identity"]
    assert set(held[unseen].tolist()) == {4855, 6217} and set(held[~unseen].tolist()) == {3, 189}
    for name, owner in zip(splits.train.names, who, strict=True):
        assert owners[int(name.removesuffix(".jpg"))] == owner


def test_mucac_reads_the_three_questions(celebrities):
    assert [NAMES.index(t) + 1 for t in TASKS] == [21, 32, 40]  # the tokens of the published code
    root, _ = celebrities
    for task in ("multi-label", *TASKS):
        splits = mucac(root, task=task, size=None)
        for data in (splits.train, splits.test):
            numbers = [int(n.removesuffix(".jpg")) for n in data.names]
            wanted = [
                n & 7 if task == "multi-label" else n >> TASKS.index(task) & 1 for n in numbers
            ]
            assert data.labels.tolist() == wanted
            assert data.columns["Young"].tolist() == [n >> 2 & 1 for n in numbers]
    with pytest.raises(SettingError, match="multi-label or one of"):
        mucac(root, task="Bald")


def test_mucac_files_that_do_not_fit_are_named(tmp_path):
    root, _ = write_mucac(tmp_path)
    whole = (root / "CelebA-HQ-attribute.txt").read_text()
    for text, match in (
        (whole.replace(" Smiling", " Grinning"), "does not name Male, Smiling, Young"),
        (whole.replace("59.jpg  -1", "59.jpg  "), "line 62 does not fit"),
        (whole.replace("59.jpg", "60.jpg"), "59.jpg has an identity but no attributes"),
    ):
        (root / "CelebA-HQ-attribute.txt").write_text(text)
        with pytest.raises(DataError, match=match):
            mucac(root, size=None)
    (root / "CelebA-HQ-attribute.txt").write_text(whole)
    (root / "CelebA-HQ-identity.txt").write_text("".join(f"{n}.jpg 200\n" for n in range(60)))
    with pytest.raises(DataError, match="no image for the side 'test'"):
        mucac(root, size=None)
    (root / "CelebA-HQ-identity.txt").write_text("0.jpg\n")
    with pytest.raises(DataError, match="line 1 is not a file and an identity"):
        mucac(root, size=None)
    (root / "CelebA-HQ-identity.txt").rename(root / "CelebAMask-HQ" / "CelebA-HQ-identity.txt")
    with pytest.raises(DataError, match="line 1"):
        mucac(root, size=None)  # found there as well
    (root / "CelebAMask-HQ" / "CelebA-HQ-identity.txt").unlink()
    with pytest.raises(DataError, match=r"no CelebA-HQ-identity\.txt"):
        mucac(root, size=None)


def test_any_table_with_a_column_of_people(korea):
    data, classes = read_image_table(
        korea / "custom_train_dataset.csv", korea / "train_images", **HEADERS
    )
    assert len(data) == 36 and set(classes) <= set("abcdefgh")
    assert set(data.columns) == {"family_id"}
    splits = split_subjects(data, column="family_id", forget=["F0002"], test=1, unseen=1)
    assert splits.sizes() == {"forget": 6, "retain": 18, "test": 6, "unseen": 6}
    named = splits.train.names
    assert all(named[i].startswith("F0002") for i in splits.train.positions(splits.request.resolve(splits.train)))  # fmt: skip


def test_images_outside_the_folder_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("image,label\n../secret.png,a\n")
    with pytest.raises(DataError, match="not below the folder"):
        read_image_table(tmp_path / "t.csv", tmp_path)


def test_splitting_opens_no_image(korea, monkeypatch):
    from expunge.problems.images import LazyImages

    data, _ = read_image_table(
        korea / "custom_train_dataset.csv", korea / "train_images", **HEADERS
    )
    monkeypatch.setattr(LazyImages, "__getitem__", lambda *_: pytest.fail("an image was opened"))
    splits = split_subjects(data, column="family_id", forget=1, test=1, unseen=1)
    for part in (splits.train, splits.test):
        numbers = ["abcdefgh".index(n.split("_")[-1][0]) for n in part.names]
        assert len(set(part.labels.tolist())) == len(set(numbers))


def test_a_network_is_trained_unlearned_and_audited_on_them(korea):
    splits = mufac(korea, forget=12, size=8)
    recipe = xp.ClassifierRecipe(
        lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8)),
        splits.train, epochs=2, lr=0.1, batch_size=12,
    )  # fmt: skip
    problem = xp.Classification(
        recipe(splits.train.ids, 0), splits.train, splits.test, recipe=recipe
    )
    outcome = xp.unlearn(problem, splits.request, xp.methods.FineTune(epochs=1))
    found = {f.name: f for f in xp.audit(outcome, "nomus", references=1)}
    assert all(f.value is not None and f.reference is not None for f in found.values()), found
    assert found["nomus/score"].detail["units"] == "people"

"""problems/image_folder.py: names, and folders that are refused."""

from pathlib import Path

import numpy as np
import pytest
from disk_forms import WORDS, X, Y, digits, named, one_line, write_folder
from PIL import Image

from expunge.core.errors import DataError, RequestError, UserError
from expunge.problems.data_on_disk import load_data, problem_from_disk
from expunge.problems.forget_file import read_forget_file


def test_folder_names_are_ids_for_a_forget_list(vit, tmp_path):
    images, labels = digits(60)
    data, _ = load_data(write_folder(tmp_path / "f", images, labels), model_folder=vit)
    assert data.names[0] == "0/0000.png"
    wanted = [7, 31, 40]
    (tmp_path / "forget.csv").write_text("file\n" + "".join(data.names[i] + "\n" for i in wanted))
    assert read_forget_file(tmp_path / "forget.csv").resolve(data).tolist() == wanted
    (tmp_path / "forget.csv").write_text("file\n0/none.png\n")
    with pytest.raises(RequestError, match=r"'0/none.png' is not in the data of 60") as error:
        read_forget_file(tmp_path / "forget.csv").resolve(data)
    one_line(error)


def unreadable(root):
    write_folder(root, X, Y)
    path = root / "3" / "zz.png"
    path.write_bytes((root / "3" / "0006.png").read_bytes()[:60])


def without_images(root):
    (root / "a").mkdir(parents=True)
    (root / "a" / "notes.txt").write_text("x")


def sixteen_bit(root):
    write_folder(root, X, Y)
    Image.fromarray(X[0].astype(np.uint16) * 257).save(root / "3" / "deep.png")


def flat(root):
    root.mkdir()
    Image.fromarray(X[0]).save(root / "a.png")


def five_classes(root):
    write_folder(root, X, Y % 5)


BAD_FOLDERS = {
    "empty": (lambda root: root.mkdir(), "no sub-folders"),
    "images without classes": (flat, "no sub-folders"),
    "no images": (without_images, "holds no images"),
    "unreadable image": (unreadable, r"3/zz.png cannot be read"),
    "16 bits": (sixteen_bit, r"3/deep.png: images must have 8 bits"),
    "other number of classes": (five_classes, "5 classes but the model has 10"),
    "not there": (lambda root: None, "no file or folder"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_image_folder_gives_one_sentence(case, vit, tmp_path):
    write, wanted = BAD_FOLDERS[case]
    write(tmp_path / "f")
    with pytest.raises(UserError, match=wanted) as error:
        problem_from_disk(vit, str(tmp_path / "f"))
    one_line(error)
    assert error.value.exit_code == 2


def test_class_folders_that_the_model_half_knows(vit, tmp_path):
    model = named(vit, tmp_path / "model", WORDS)
    root = write_folder(tmp_path / "f", X, Y, [*WORDS[:3], "tree", *WORDS[4:]])
    with pytest.raises(DataError, match="class 'tree' is not among the 10 known") as error:
        load_data(root, model_folder=model)
    one_line(error)


def test_numbered_folders_beyond_nine_are_ambiguous(tmp_path):
    with pytest.raises(DataError, match="named by numbers") as error:
        load_data(write_folder(tmp_path / "f", X[:12], range(12)), model_folder=None)
    one_line(error)


def test_images_of_different_sizes_without_one_said(tmp_path):
    root = Path(write_folder(tmp_path / "f", X, Y))
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(root / "9" / "zz.png")
    data, classes = load_data(str(root), model_folder=None)
    assert classes == [str(i) for i in range(10)]
    with pytest.raises(DataError, match=r"zz.png is 9×8 and others 8×8") as error:
        data.fingerprint()
    one_line(error)

"""problems/images.py: images are prepared when asked for, class names follow the model."""

import pickle

import numpy as np
import pytest
from disk_forms import WORDS, digits, named, one_line, write_folder, write_npz

from expunge.core.errors import DataError
from expunge.problems.data_on_disk import load_data
from expunge.problems.images import KEEP_BYTES, LazyImages, Reader
from expunge.problems.preprocessing import Preprocessing


def test_images_are_read_when_asked_for_and_labels_without_reading(vit, tmp_path):
    images, labels = digits(30)
    root = write_folder(tmp_path / "f", images, labels)
    data, _ = load_data(root, model_folder=vit)
    (tmp_path / "f" / data.names[4]).write_bytes(b"not an image")
    assert data.labels.tolist() == labels.tolist()
    assert len(data.fetch(data.ids[:4])) == 4
    with pytest.raises(DataError, match=data.names[4]) as error:
        data.fetch(data.ids[4:5])
    one_line(error)


def test_prepared_images_are_kept_only_while_all_fit():
    small = LazyImages(np.zeros((2, 1, 4, 4), np.uint8), None, Preprocessing(1), "x")
    assert small[0][0] is small[0][0]

    class Huge:
        def __len__(self):
            return KEEP_BYTES // 64 + 1

        def __getitem__(self, position):
            return np.zeros((1, 4, 4), np.uint8)

    huge = LazyImages(Huge(), None, Preprocessing(1), "x")
    assert huge[0][0] is not huge[0][0]
    assert pickle.loads(pickle.dumps(small))[1][0].shape == (1, 4, 4)


def test_class_names_follow_the_model(vit, tmp_path):
    backwards = [word.title() for word in WORDS[::-1]]
    model = named(vit, tmp_path / "model", backwards)
    images, labels = digits(100)
    keep = labels < 4
    root = write_folder(tmp_path / "f", images[keep], labels[keep], [w.upper() for w in WORDS])
    data, classes = load_data(root, model_folder=model)
    assert classes == backwards
    truth = [9 - WORDS.index(name.split("/")[0].lower()) for name in data.names]
    assert data.labels.tolist() == truth
    words = np.array([WORDS[i] for i in labels])
    data, classes = load_data(write_npz(tmp_path / "w.npz", X=images, y=words), model_folder=model)
    assert data.labels.tolist() == [9 - i for i in labels]


@pytest.mark.parametrize("names", [["1", "2", "3"], ["0", "2", "3"]])
def test_folders_named_by_other_numbers_than_the_classes_are_refused(names):
    from pathlib import Path

    with pytest.raises(DataError, match="not the class numbers"):
        Reader(None, None).number(names, Path("photos"))
    assert Reader(None, None).number(["0", "1", "2"], Path("photos"))[0] == {"0": 0, "1": 1, "2": 2}

"""problems/npz_file.py: one sentence for every way in which a file can be wrong."""

import gc
import pickle
import warnings

import numpy as np
import pytest
from disk_forms import X, Y, by_hand, one_line, write_npz

from expunge.core.errors import DataError, ModelError
from expunge.problems.data_on_disk import problem_from_disk

NAN = by_hand(X).double().numpy()
NAN = np.where(np.arange(20)[:, None, None, None] == 7, np.nan, NAN)


def raw(content):
    return lambda path: path.write_bytes(content)


def npz(**arrays):
    return lambda path: np.savez(path, **arrays)


def one_array(path):
    with path.open("wb") as file:
        np.save(file, X)


def half_npz(path):
    np.savez(path, X=X, y=Y)
    path.write_bytes(path.read_bytes()[:600])


BAD_FILES = {
    "NaN": (npz(X=NAN, y=Y), "NaN"),
    "infinite": (npz(X=np.where(np.isnan(NAN), np.inf, NAN), y=Y), "infinite"),
    "too large for float32": (npz(X=np.where(np.isnan(NAN), 1e300, NAN), y=Y), "infinite"),
    "no X": (npz(images=X), "no array X; it has images"),
    "no samples": (npz(X=X[:0], y=Y[:0]), "no samples"),
    "objects": (npz(X=X, y=np.array([{}] * 20, dtype=object)), "Python objects"),
    "whole numbers": (npz(X=X.astype(np.int64), y=Y), "uint8 or float, not int64"),
    "flat": (npz(X=X.reshape(20, 64), y=Y), "must be images"),
    "five axes": (npz(X=X[:, None, None], y=Y), "must be images"),
    "colour floats": (npz(X=np.zeros((20, 3, 8, 8)), y=Y), "3 channels, but the model takes 1"),
    "fewer labels": (npz(X=X, y=Y[:19]), "20 images but labels"),
    "one-hot": (npz(X=X, y=np.eye(10)[Y]), "20 images but labels"),
    "fractions": (npz(X=X, y=Y + 0.5), "class numbers"),
    "negative": (npz(X=X, y=Y - 1), "class numbers"),
    "too many classes": (npz(X=X, y=Y + 1), "label 10 but there are 10 classes"),
    "float ids": (npz(X=X, y=Y, ids=Y * 1.0), "whole numbers"),
    "repeated ids": (npz(X=X, y=Y, ids=Y), "unique"),
    "empty file": (raw(b""), "cannot be read"),
    "a pickle": (raw(pickle.dumps({"X": 1})), "cannot be read"),
    "text": (raw(b"a,b\n1,2\n"), "cannot be read"),
    "one array": (one_array, "cannot be read"),
    "cut": (half_npz, "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_npz_gives_one_sentence(case, vit, tmp_path):
    write, wanted = BAD_FILES[case]
    path = tmp_path / "a.npz"
    write(path)
    with pytest.raises(DataError, match=wanted) as error:
        problem_from_disk(vit, str(path))
    one_line(error)
    assert error.value.exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_floats_of_another_size_do_not_fit(vit, tmp_path):
    path = write_npz(tmp_path / "a.npz", X=np.zeros((4, 10, 10)), y=np.arange(4))
    with pytest.raises(ModelError, match="does not take this data") as error:
        problem_from_disk(vit, path)
    one_line(error)


def test_a_damaged_file_is_closed_again(vit, tmp_path):
    half_npz(tmp_path / "a.npz")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(DataError):
            problem_from_disk(vit, str(tmp_path / "a.npz"))
        gc.collect()
    assert not [w for w in seen if issubclass(w.category, ResourceWarning)]

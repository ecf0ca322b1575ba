"""problems/datasets_folder.py: labels follow the model, and folders that are refused."""

import datasets
import pytest
from disk_forms import X, Y, digits, named, one_line, rows, write_datasets

from expunge.core.errors import DataError
from expunge.problems.data_on_disk import load_data, problem_from_disk


def test_class_labels_of_datasets_follow_the_model(vit, tmp_path):
    model = named(vit, tmp_path / "model", [str(i) for i in range(9, -1, -1)])
    images, labels = digits(40)
    path = write_datasets(tmp_path / "rows", images, labels)
    data, _ = load_data(path, model_folder=model)
    assert data.labels.tolist() == [9 - i for i in labels]


def edit_datasets(change):
    def write(root):
        change(rows(X, Y)).save_to_disk(str(root))

    return write


def no_label_values(data):
    return data.cast_column("label", datasets.Value("int64")).map(
        lambda row, i: {"label": None if i == 4 else row["label"]}, with_indices=True
    )


def broken_bytes(data):
    encoded = [{"bytes": b"nonsense", "path": None}] * 20
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": encoded, "label": Y.tolist()}, features)


def damaged(root):
    rows(X, Y).save_to_disk(str(root))
    next(root.glob("*.arrow")).write_bytes(b"nonsense")


BAD_DATASETS = {
    "no image column": (edit_datasets(lambda d: d.remove_columns("image")), "no image column"),
    "empty": (edit_datasets(lambda d: d.select([])), "no samples|cannot be read as"),
    "labels missing": (edit_datasets(no_label_values), "1 labels are missing, the first at 4"),
    "broken image": (edit_datasets(broken_bytes), "image 0 cannot be read"),
    "damaged table": (damaged, "cannot be read as a datasets folder"),
}


@pytest.mark.parametrize("case", BAD_DATASETS)
def test_a_bad_datasets_folder_gives_one_sentence(case, vit, tmp_path, capfd):
    write, wanted = BAD_DATASETS[case]
    write(tmp_path / "d")
    capfd.readouterr()
    with pytest.raises(DataError, match=wanted) as error:
        problem_from_disk(vit, str(tmp_path / "d"))
    one_line(error)
    assert capfd.readouterr() == ("", "")

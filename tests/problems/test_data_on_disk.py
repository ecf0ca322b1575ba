"""problems/data_on_disk.py: three forms of the same data, forget lists, and what is refused."""

import json
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from expunge.core.errors import DataError, ModelError, RequestError, UserError
from expunge.core.request import Request, forget
from expunge.problems.data_on_disk import (
    KEEP_BYTES,
    LazyImages,
    load_data,
    problem_from_disk,
    read_forget_file,
)
from expunge.problems.models_on_disk import Preprocessing, save_image_classifier

torch.set_num_threads(1)
datasets.disable_progress_bars()
MEAN, STD = 0.25, 0.5
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def digits(count=400):
    """Images [N, 8, 8] uint8 and labels, sorted by class: the order of an image folder."""
    bunch = load_digits()
    x = (bunch.images[:count] * 15.9375).astype(np.uint8)
    order = np.argsort(bunch.target[:count], kind="stable")
    return x[order], bunch.target[:count][order]


def by_hand(x):
    return torch.tensor((x.astype(np.float64) / 255 - MEAN) / STD).float()[:, None]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A tiny ViT trained for a few seconds on digits, with a preprocessor config."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    images, labels = digits()
    x, y = by_hand(images), torch.tensor(labels)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        pick = torch.randint(0, len(x), (128,))
        optimiser.zero_grad()
        cross_entropy(model(x[pick]).logits, y[pick]).backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("models") / "vit"
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 8, "width": 8},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN],
        "image_std": [STD],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def named(vit, folder, names):
    """The same model with names for its classes."""
    shutil.copytree(vit, folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): n for i, n in enumerate(names)}
    config["label2id"] = {n: i for i, n in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_folder(root, images, labels, names=None):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = root / (str(label) if names is None else names[label])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:04}.png")
    return str(root)


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def rows(images, labels, **more):
    columns = {"image": [Image.fromarray(i) for i in images], **more}
    features = {"image": datasets.Image()}
    features |= {name: datasets.Value("int64") for name in more}
    if labels is not None:
        columns["label"] = list(map(int, labels))
        features["label"] = datasets.ClassLabel(names=[str(i) for i in range(10)])
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def write_datasets(root, *args, **more):
    rows(*args, **more).save_to_disk(str(root))
    return str(root)


def everything(data):
    batch = data.fetch(data.ids)
    return batch.x, batch.y


def one_line(error):
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def test_three_forms_of_the_same_images_give_the_same_tensors(vit, tmp_path, capfd):
    images, labels = digits(120)
    ready = by_hand(images)
    paths = {
        "NHW": write_npz(tmp_path / "a.npz", X=images, y=labels),
        "NCHW": write_npz(tmp_path / "b.npz", X=images[:, None], y=labels),
        "NHWC": write_npz(tmp_path / "c.npz", X=images[..., None], y=labels),
        "float": write_npz(tmp_path / "d.npz", X=ready.numpy().astype(np.float64), y=labels),
        "folder": write_folder(tmp_path / "folder", images, labels),
        "datasets": write_datasets(tmp_path / "rows", images, labels),
    }
    capfd.readouterr()
    for form, path in paths.items():
        data, classes = load_data(path, model_folder=vit)
        x, y = everything(data)
        assert x.dtype == torch.float32, form
        assert x.shape == (120, 1, 8, 8), form
        assert torch.allclose(x, ready, atol=1e-6), form
        assert y.tolist() == labels.tolist() == data.labels.tolist(), form
        assert classes == [str(i) for i in range(10)] or classes[3] == "LABEL_3", form
    assert capfd.readouterr() == ("", "")


def test_colour_and_grey_forms_agree_for_a_colour_model(tmp_path):
    folder = tmp_path / "model"
    config = ViTConfig(image_size=8, patch_size=4, num_channels=3, hidden_size=8, num_labels=2)
    config.num_hidden_layers, config.num_attention_heads, config.intermediate_size = 1, 1, 8
    ViTForImageClassification(config).save_pretrained(folder)
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)
    labels = np.array([0, 0, 0, 1, 1, 1])
    from_folder, _ = load_data(
        write_folder(tmp_path / "rgb", rgb, labels), model_folder=str(folder)
    )
    last, _ = load_data(write_npz(tmp_path / "a", X=rgb) + ".npz", model_folder=str(folder))
    first = np.ascontiguousarray(np.moveaxis(rgb, 3, 1))
    first, _ = load_data(write_npz(tmp_path / "b", X=first) + ".npz", model_folder=str(folder))
    wanted = torch.stack([
        torch.tensor(np.asarray(Image.fromarray(i).resize((8, 8), Image.Resampling.BILINEAR)) / 255)
        for i in rgb
    ]).movedim(3, 1)
    for data in (from_folder, last, first):
        assert torch.allclose(everything(data)[0], wanted.float(), atol=1e-6)
    grey, _ = load_data(write_npz(tmp_path / "c", X=rgb[..., 0]) + ".npz", model_folder=str(folder))
    x, y = everything(grey)
    assert y is None
    assert torch.equal(x[:, 0], x[:, 2])


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


def test_class_labels_of_datasets_follow_the_model(vit, tmp_path):
    model = named(vit, tmp_path / "model", [str(i) for i in range(9, -1, -1)])
    images, labels = digits(40)
    path = write_datasets(tmp_path / "rows", images, labels)
    data, _ = load_data(path, model_folder=model)
    assert data.labels.tolist() == [9 - i for i in labels]


def test_ids_and_names_of_files(vit, tmp_path):
    images, labels = digits(20)
    ids = np.arange(100, 120)
    names = np.array([f"n{i}" for i in ids])
    path = write_npz(tmp_path / "a.npz", X=images, y=labels, ids=ids, names=names)
    data, _ = load_data(path, model_folder=vit)
    assert forget(ids=["n103", 119]).resolve(data).tolist() == [103, 119]
    path = write_datasets(tmp_path / "rows", images, labels, id=ids.tolist())
    data, _ = load_data(path, model_folder=vit)
    assert data.ids.tolist() == ids.tolist()
    assert torch.allclose(data.fetch(torch.tensor([105])).x, by_hand(images[5:6]), atol=1e-6)


def test_parts_of_the_data(vit, tmp_path):
    images, labels = digits(100)
    train, test = np.arange(100) % 2 == 0, (np.arange(100) % 2 == 1) & (labels != 3)
    write_folder(tmp_path / "f" / "train", images[train], labels[train])
    write_folder(tmp_path / "f" / "test", images[test], labels[test])
    parts = {"train": rows(images[train], labels[train]), "test": rows(images[test], labels[test])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    for place in ("f", "d"):
        problem = problem_from_disk(vit, str(tmp_path / place))
        assert torch.allclose(everything(problem.train)[0], by_hand(images[train]), atol=1e-6)
        # the test part lacks a class, which must not shift the others
        assert problem.test.labels.tolist() == labels[test].tolist()
        assert problem.source["test"] is None
        with pytest.raises(DataError, match="no part 'valid'"):
            load_data(str(tmp_path / place), model_folder=vit, split="valid")
    other = problem_from_disk(vit, str(tmp_path / "f"), test=str(tmp_path / "d"))
    assert torch.equal(other.test.labels, problem.test.labels)


def test_a_problem_from_disk_predicts_and_can_be_saved(vit, tmp_path, capfd):
    images, labels = digits()
    path = write_npz(tmp_path / "a.npz", X=images, y=labels)
    problem = problem_from_disk(vit, path)
    assert capfd.readouterr() == ("", "")
    assert problem.source == {
        "kind": "disk",
        "model": str(Path(vit).resolve()),
        "data": str(Path(path).resolve()),
        "test": None,
        "preprocessing": "grey, resize to 8×8, scale by 0.00392157, mean (0.25,), std (0.5,) "
        "(from preprocessor_config.json)",
    }
    batch = problem.train.fetch(problem.train.ids)
    with torch.no_grad():
        logits = problem.logits(problem.model, batch)
        again = AutoModelForImageClassification.from_pretrained(vit)(by_hand(images)).logits
    assert torch.allclose(logits, again, atol=1e-4)
    assert (logits.argmax(1) == batch.y).float().mean() > 0.8
    out = save_image_classifier(problem.model, tmp_path / "out", vit, problem.fingerprint())
    same = problem_from_disk(str(out), path)
    assert same.fingerprint() == problem.fingerprint()


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.csv", "id\n3\n5\n3\n", {"ids": (3, 5)}),
        ("a.csv", "\ufeffid,why\r\n3,gdpr\r\n5,\r\n", {"ids": (3, 5)}),
        ("a.csv", "3\n5\n", {"ids": (3, 5)}),
        ("a.csv", "why;File\nx;cat/1.png\n", {"ids": ("cat/1.png",)}),
        ("a.csv", 'name\n"a, b.png"\n', {"ids": ("a, b.png",)}),
        ("a.csv", "name\n7\n", {"ids": ("7",)}),
        ("a.csv", "label\n3\n7\n3\n", {"label": (3, 7)}),
        ("a.csv", "Label\ncat\n", {"label": (1,)}),
        ("a.csv", "id,label\n4,0\n", {"ids": (4,)}),
        ("a.tsv", "label\tid\n0\t4\n", {"ids": (4,)}),
        ("a.txt", "cat/1, big.png\n\n  12 \n007\n", {"ids": ("cat/1, big.png", 12, "007")}),
        ("a.jsonl", '3\n"cat/1.png"\n', {"ids": (3, "cat/1.png")}),
        ("a.jsonl", '{"id": 3}\n\n{"id": "5", "label": 1}\n', {"ids": (3, 5)}),
        ("a.jsonl", '{"label": "cat"}\n{"label": 0}\n', {"label": (1, 0)}),
    ],
)
def test_forget_lists(name, text, wanted, tmp_path):
    (tmp_path / name).write_text(text, newline="")
    assert read_forget_file(tmp_path / name, ["dog", "cat"]) == Request(**wanted)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", b"", "nothing to forget"),
        ("a.csv", b"id\n", "nothing to forget"),
        ("a.csv", b"\n \n", "nothing to forget"),
        ("a.jsonl", b"\n", "nothing to forget"),
        ("a.txt", b"", "nothing to forget"),
        ("a.csv", b"id,why\n3,a\n,b\n", "empty id in entry 2"),
        ("a.csv", b"3,4\n5,6\n", "several columns"),
        ("a.csv", b'id\n"3\n', "no CSV file"),
        ("a.csv", b"label\nbird\n", "'bird' is not a class"),
        ("a.csv", b"label\n-1\n", "'-1' is not a class"),
        ("a.csv", b"\xff\xfe\x00", "cannot be read"),
        ("a.jsonl", b"{no\n", "line 1 is not JSON"),
        ("a.jsonl", b'{"id": 1}\n{"label": 1}\n', "mixes"),
        ("a.jsonl", b'{"why": 1}\n', "line 1 gives no id"),
        ("a.jsonl", b"true\n", "line 1 gives no id"),
        ("a.jsonl", b"1.5\n", "line 1 gives no id"),
    ],
)
def test_bad_forget_lists(name, content, match, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=match) as error:
        read_forget_file(tmp_path / name, ["dog", "cat"])
    one_line(error)


def test_a_forget_list_that_is_not_there(tmp_path):
    for place in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(RequestError, match="cannot be read") as error:
            read_forget_file(place)
        one_line(error)


def test_ids_that_the_data_lacks(vit, tmp_path):
    images, labels = digits(20)
    data, _ = load_data(write_npz(tmp_path / "a.npz", X=images, y=labels), model_folder=vit)
    (tmp_path / "forget.csv").write_text("id\n3\n20\n99\n")
    with pytest.raises(RequestError, match="ids 20, 99 are not in the data of 20") as error:
        read_forget_file(tmp_path / "forget.csv").resolve(data)
    one_line(error)


X, Y = digits(20)
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


def test_data_without_labels(vit, tmp_path):
    path = write_datasets(tmp_path / "d", X, None)
    for place in (path, write_npz(tmp_path / "a.npz", X=X)):
        problem = problem_from_disk(vit, place)
        assert problem.train.labels is None
        assert problem.train.fetch(problem.train.ids).y is None
        with pytest.raises(RequestError, match="no labels"):
            forget(label=3).resolve(problem.train)

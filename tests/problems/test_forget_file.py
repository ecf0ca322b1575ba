"""problems/forget_file.py: every form of a list, and what is refused."""

import pytest
from disk_forms import digits, one_line, write_npz

from expunge.core.errors import RequestError
from expunge.core.request import Request
from expunge.problems.data_on_disk import load_data
from expunge.problems.forget_file import read_forget_file


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

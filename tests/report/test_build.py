"""The three files: complete, escaped, self-contained, written whole or not at all."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_data import CLASS, finding, make_data

from expunge.core.errors import ExpungeError
from expunge.report import render_html, render_markdown, write_report
from expunge.report.explain import KNOWN, explain, explanations

VOID = {"meta", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that elements close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.wrong: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def page(data):
    return Page(render_html(data))


def test_elements_close_in_order(page):
    assert page.wrong == []
    assert page.stack == []


def test_page_is_self_contained(page):
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "video", "img"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")  # fmt: skip
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "url(" not in render_html(make_data(1))
    assert "@import" not in render_html(make_data(1))


def test_the_verdict_comes_before_tables_and_figures_and_records_last(data):
    html = render_html(data)
    places = [html.index(t) for t in ('class="verdict"', 'class="methods"', "Quality and cost", "Accuracy per class", "Membership scores", "Layers (CKA)", "Unlearning curves", "How to read the findings", "Records and settings")]  # fmt: skip
    assert places == sorted(places)


def test_every_finding_is_explained_with_meaning_and_direction(page, data):
    names = {n for c in data["comparisons"] for r in c["rows"] for n in r["findings"]}
    assert len(names) == 27
    for name in names:
        assert name in KNOWN, name
        words = explain(name)
        assert name in page.text
        assert words.meaning in page.text
        assert words.good in page.text
        assert re.search(r"reference|Down|Up|No verdict", words.good)


def test_a_finding_of_a_third_party_gets_words_too():
    data = make_data(1)
    data["comparisons"][0]["rows"][2]["findings"]["canary/exposure-rank"] = finding(3.0, 1.0, "down")  # fmt: skip
    found = explanations(data["comparisons"])["canary/exposure-rank"]
    assert "canary" in found.meaning
    assert found.good == "Down."
    assert "canary/exposure-rank" in Page(render_html(data)).text


def test_texts_are_escaped_everywhere():
    data = make_data(1)
    evil = "<script>alert('x')</script>"
    one = data["comparisons"][0]
    one["title"] = one["request"]["text"] = one["workload"] = data["command"] = evil
    one["rows"][3] |= {"method": evil, "notes": [evil], "run": evil, "intent": evil, "guarantee": evil}  # fmt: skip
    one["rows"][3]["settings"] = {evil: evil}
    one["rows"][3]["findings"][evil] = finding(None, reason=evil)
    one["rows"][4]["findings"]["cka/original"]["detail"]["layers"][0] = evil
    one["references"][0]["run"] = evil
    html = render_html(data)
    assert "<script" not in html
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) > 5
    assert "<script" not in re.sub("`[^`]*`", "", render_markdown(data))  # code shows it as it is


def test_json_is_the_dict_and_comes_back(data, tmp_path):
    paths = write_report(data, tmp_path / "new" / "folder")
    assert set(paths) == {"html", "json", "md"}
    back = json.loads(paths["json"].read_text())
    assert back == data
    again = write_report(back, tmp_path / "again")
    for suffix in paths:
        assert again[suffix].read_text() == paths[suffix].read_text()


def test_rendering_does_not_change_the_data(data):
    before = copy.deepcopy(data)
    render_html(data)
    render_markdown(data)
    assert data == before


def test_nan_becomes_null(tmp_path):
    data = make_data(1)
    data["comparisons"][0]["rows"][2]["findings"]["accuracy/forget-test"]["value"] = float("nan")
    text = write_report(data, tmp_path)["json"].read_text()
    assert "NaN" not in text
    assert json.loads(text)["comparisons"][0]["rows"][2]["findings"]["accuracy/forget-test"]["value"] is None  # fmt: skip


def test_name_is_the_stem_and_nothing_else_is_left(data, tmp_path):
    write_report(data, tmp_path, "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.html", "mine.json", "mine.md"]


def test_a_file_in_the_way_is_one_sentence(data, tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ExpungeError, match="cannot be written") as caught:
        write_report(data, tmp_path / "taken")
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_files_and_no_rest(data, tmp_path, monkeypatch):
    write_report(data, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real = Path.write_text

    def full(self, text, **kwargs):
        if "html" in self.name:
            raise OSError(28, "No space left on device")
        return real(self, text, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ExpungeError, match="No space left on device"):
        write_report(make_data(1), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("seeds", [1, 3])
def test_markdown_has_one_row_a_method(seeds):
    text = render_markdown(make_data(1, seeds=seeds))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(CLASS)
    assert [line.split("|")[1].strip() for line in table[2:]] == list(CLASS)
    assert {line.count("|") for line in table} == {table[0].count("|")}
    assert "ref. 0.010, +0.590" in text
    assert ("over 3 seeds" in text) == (seeds == 3)


def test_markdown_survives_pipes_and_stars():
    data = make_data(1)
    data["comparisons"][0]["rows"][3]["method"] = "a|b*c\nd"
    table = [line for line in render_markdown(data).splitlines() if line.startswith("|")]
    unescaped = [re.sub(r"\\\|", "", line).count("|") for line in table]
    assert len(set(unescaped)) == 1
    assert any(r"a\|b\*c d" in line for line in table)


def test_no_references_gives_values_without_verdict_and_the_reason():
    data = make_data(references=0)
    page = Page(render_html(data))
    assert "no retrained reference to compare with" in page.text
    assert "No retrained reference: values without a verdict." in page.text
    assert "0.600" in page.text
    verdicts = re.findall(r'<td class="says state-(\w+)"', render_html(data))
    assert set(verdicts) == {"plain", "unjudged"}


@pytest.mark.parametrize("keep", ["accuracy/", "membership/", "cost/", "nothing"])
def test_any_finding_may_be_missing(keep):
    data = make_data()
    for one in data["comparisons"]:
        for row in one["rows"]:
            row["findings"] = {n: f for n, f in row["findings"].items() if n.startswith(keep)}
    assert Page(render_html(data)).stack == []
    assert render_markdown(data)


def test_any_finding_may_be_null_and_details_may_be_empty():
    data = make_data(1)
    for row in data["comparisons"][0]["rows"]:
        row["findings"] = {n: finding(None, reason="it broke") for n in row["findings"]}
    page = Page(render_html(data))
    assert "it broke" in page.text
    bare = make_data(1)
    for row in bare["comparisons"][0]["rows"]:
        for found in row["findings"].values():
            found["detail"] = {}
        for key in ("cost", "settings", "details", "notes", "curve", "fidelity"):
            row.pop(key)
    bare["comparisons"][0].pop("splits")
    assert Page(render_html(bare)).wrong == []


def test_no_comparison_is_a_page_too(tmp_path):
    data = make_data(0)
    assert "There is nothing to compare" in Page(render_html(data)).text
    write_report(data, tmp_path)


def test_many_methods_fold_away_further_panels():
    data = make_data(1)
    rows = data["comparisons"][0]["rows"]
    rows += [{**rows[2], "method": f"m{i}"} for i in range(30)]
    page = Page(render_html(data))
    assert f"{len(CLASS) + 30 - 12} more" in page.text
    assert sum(t == "tr" and a.get("class") != "shown" for t, a in page.tags) > 38


def test_seeds_are_shown_with_an_interval_over_them():
    page = Page(render_html(make_data(1, seeds=3)))
    assert "over 3 seeds" in page.text
    assert "3 seeds" in page.text
    assert "finetune, seed 2" in page.text


def test_records_hold_settings_runs_and_notes(page, data):
    row = data["comparisons"][0]["rows"][3]
    assert row["run"] in page.text
    assert row["notes"][0] in page.text
    assert '"in_force": {"lr": 0.01, "epochs": 5}' in page.text
    assert data["comparisons"][0]["references"][2]["run"] in page.text

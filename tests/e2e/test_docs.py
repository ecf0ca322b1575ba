"""Documentation against code: pages, header facts, names, commands, JSON keys, links, paths."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import expunge
from expunge.audits import registry as audits
from expunge.cli.reference import commands
from expunge.methods import registry as methods

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {page: page.read_text() for page in PAGES}
SCRIPTING = TEXT[ROOT / "docs" / "scripting.md"]


def flat(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------ pages and their headers


def header(page: str) -> dict[str, str]:
    """Facts before the first section: rows `| key | text |` or items `- **Key:** text`."""
    top = page.split("\n## ")[0]
    facts = dict(re.findall(r"^\| (\w+) \| (.*) \|$", top, flags=re.MULTILINE))
    items = re.findall(r"^- \*\*(\w+)[:.]?\*\*:? (.*?)(?=^- |\Z)", top, re.DOTALL | re.MULTILINE)
    return {key.lower(): flat(text) for key, text in [*facts.items(), *items]}


def stated_needs(text: str) -> set[str]:
    """Phrases of the first sentence, without remarks in brackets and backticks."""
    sentence = re.split(r"\.(?:\s|$)", text)[0]
    return {p.strip(" `") for p in re.sub(r"\([^)]*\)", "", sentence).split(",")} - {"", "–"}


def page_of(kind: str, name: str) -> str:
    path = ROOT / "docs" / kind / f"{name}.md"
    assert path.exists(), f"docs/{kind}/{name}.md is missing"
    return path.read_text()


ENTRIES = [("methods", name) for name in methods] + [("audits", name) for name in audits]


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_header_equals_the_card(kind, name):
    found = (methods if kind == "methods" else audits).get(name)
    page = page_of(kind, name)
    facts, card = header(page), found.card
    assert page.startswith("# ")
    for part in (card.title, card.link, str(card.year)):
        assert flat(part) in facts["paper"]
    # the page may give first names where the card does not, or the other way round
    first = re.split(r",| and | et al", card.authors)[0].split()[-1]
    assert first in facts["paper"]
    wanted = [("intent", card.intent), ("guarantee", card.guarantee), ("fidelity", card.fidelity)]
    for key, word in wanted:
        if kind == "methods" or key in facts:
            assert re.match(rf"{re.escape(word)}\b", facts[key]), f"{key}: {facts[key]}"


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_needs_equal_those_declared(kind, name):
    found = (methods if kind == "methods" else audits).get(name)
    stated, declared = stated_needs(header(page_of(kind, name))["needs"]), found().needs.words()
    for phrase in stated:
        known = any(re.match(rf"{re.escape(w)}\b", phrase) for w in declared)
        assert known or (not declared and phrase in ("none", "nothing")), f"{phrase!r} is no need"
    for word in declared:
        assert any(re.match(rf"{re.escape(word)}\b", p) for p in stated), f"{word!r} is missing"


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_deviations_are_numbered_on_the_page(kind, name):
    found = (methods if kind == "methods" else audits).get(name)
    page = page_of(kind, name)
    section = re.search(r"^## Deviations\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    numbered = re.findall(r"^\d+\. ", section[1], re.MULTILINE) if section else []
    assert len(numbered) == len(found.card.deviations)
    for deviation in found.card.deviations:
        file, _, test = deviation.test.partition("::")
        assert f"def {test}" in (ROOT / file).read_text(), f"{deviation.test} does not exist"


def test_every_page_belongs_to_something_registered():
    for kind, registry in (("methods", methods), ("audits", audits)):
        there = {p.stem for p in (ROOT / "docs" / kind).glob("*.md")}
        assert there - {"calibration"} == set(registry)  # a page about several audits


def test_readme_lists_every_method_and_audit():
    readme = TEXT[ROOT / "README.md"]
    for kind, name in ENTRIES:
        assert f"[`{name}`](docs/{kind}/{name}.md)" in readme


# ------------------------------------------------------------------ names and commands


@pytest.mark.parametrize("name", expunge.__all__)
def test_public_name_is_mentioned(name):
    assert any(re.search(rf"\bxp\.{name}\b", text) for text in TEXT.values())


def test_documented_names_exist():
    for page, text in TEXT.items():
        for name in re.findall(r"\bxp\.(\w+)", text):
            assert name in expunge.__all__, f"{page.name}: xp.{name}"
        for kind, name in re.findall(r"\bxp\.(methods|audits)\.([A-Z]\w+)", text):
            assert name in dir(getattr(expunge, kind)), f"{page.name}: xp.{kind}.{name}"


@pytest.mark.parametrize("name", list(commands()))
def test_command_is_mentioned(name):
    assert any(re.search(rf"\b{name}\b", text) for text in TEXT.values())


def shell_lines() -> list[tuple[str, str]]:
    """Every `expunge …` in a shell block or in backticks, with the page it is on."""
    found = []
    for page, text in TEXT.items():
        for block in re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            found += [(page.name, line) for line in block.splitlines()]
        inline = re.findall(r"`(?:\.venv/bin/)?(expunge [^`]*)`", re.sub(r"\n", " ", text))
        found += [(page.name, line) for line in inline]
    return [(page, line) for page, line in found if line.startswith("expunge ")]


@pytest.mark.parametrize(("page", "line"), sorted(set(shell_lines())))
def test_documented_command_exists_with_its_options(page, line):
    words = shlex.split(line.split(" > ")[0].split(" 2> ")[0])
    known, name = commands(), "expunge"
    rest = words[1:]
    while rest and f"{name} {rest[0]}" in known:
        name = f"{name} {rest.pop(0)}"
    if getattr(known[name], "commands", {}) and rest:
        assert rest[0].startswith("-"), f"{page}: expunge has no command {rest[0]!r}"
    options = {o for p in known[name].params for o in (*p.opts, *p.secondary_opts)}
    used = {word for word in rest if word.startswith("-")}
    assert used <= options | {"--help"}, f"{page}: {line}"
    listed = next((rest[i + 1] for i, w in enumerate(rest) if w in ("--method", "--methods")), "")
    assert set(filter(None, listed.split(","))) <= {*methods, "NAME"}


def test_documented_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {t for text in TEXT.values() for t in re.findall(r"`make ([a-z]+)`", text)}
    assert named <= targets
    assert {"demo", "test", "acceptance", "benchmarks"} <= named


# ------------------------------------------------------------------ the JSON that scripts read


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[Path, dict]:
    """The command of docs/scripting.md, with one method less."""
    folder = tmp_path_factory.mktemp("scripting")
    line = "compare --workload digits-class --methods ssd --references 2 --threads 1 --json"
    done = subprocess.run(
        [sys.executable, "-m", "expunge", *line.split()],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "EXPUNGE_STORE": str(folder / "store")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert {e["event"] for e in events} >= {"start", "finish"}
    (folder / "found.json").write_text(done.stdout)
    return folder, json.loads(done.stdout)


def documented(first_cell: str) -> set[str]:
    """Names in backticks of the first column of the table that begins with a cell."""
    table = re.search(rf"^\| {first_cell} \| \|\n\|.*\n((?:\|.*\n)+)", SCRIPTING, re.MULTILINE)
    assert table is not None
    return {n for row in table[1].splitlines() for n in re.findall("`([^`]+)`", row.split("|")[1])}


def test_comparison_has_the_documented_keys(compared):
    _, data = compared
    assert set(data) == {"expunge", "created", "command", "comparisons", "report"}
    (one,) = data["comparisons"]
    assert set(one) == documented("comparison")
    assert [row["method"] for row in one["rows"]] == ["original", "retrain", "ssd"]
    assert [row["seed"] for row in one["rows"]] == [0, 1001, 0]
    for row in one["rows"]:
        assert set(row) == documented("row")
        for finding in row["findings"].values():
            assert set(finding) == documented("finding")


def test_findings_have_the_documented_names(compared):
    _, data = compared
    names = documented("findings")
    also = {f"divergence/{kind}-{split}" for kind in ("js", "kl") for split in ("forget-test", "retain-test")}  # fmt: skip
    assert "for `forget-test` and `retain-test`" in SCRIPTING
    wanted = (names - {"forget-test", "retain-test"}) | also
    for row in data["comparisons"][0]["rows"]:
        assert set(row["findings"]) == wanted


def test_gap_is_value_less_reference(compared):
    _, data = compared
    for row in data["comparisons"][0]["rows"]:
        for finding in row["findings"].values():
            if finding["value"] is None or finding["reference"] is None:
                assert finding["gap"] is None
            else:
                assert finding["gap"] == finding["value"] - finding["reference"]


def test_report_holds_what_was_printed(compared):
    folder, data = compared
    assert data["report"] == "report/report.html"
    assert (folder / "report" / "report.html").exists()
    assert json.loads((folder / "report" / "report.json").read_text()) == data


def test_the_example_script_runs(compared, monkeypatch, capsys):
    folder, _ = compared
    (block,) = re.findall(r"^```python\n(.*?)^```", SCRIPTING, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(folder)
    exec(block, {})
    assert capsys.readouterr().out.startswith("original 1.0 0.0 None\n")


@pytest.mark.parametrize("noun", ["methods", "audits"])
def test_listing_has_the_documented_keys(noun, capsys):
    from expunge.cli.listing import describe

    registry = methods if noun == "methods" else audits
    for name in registry:
        entry = describe(name, registry.get(name))
        assert set(entry) == documented("entry")
        for setting in entry["settings"]:
            assert set(setting) == {"name", "type", "default", "range", "help", "source"}


# ------------------------------------------------------------------ contributing, links, paths


def test_contributing_is_short():
    assert len(TEXT[ROOT / "CONTRIBUTING.md"].splitlines()) <= 70


def test_contributed_method_passes_the_common_checks(tmp_path, monkeypatch):
    from expunge.suite.checks import check_method

    (block,) = re.findall(
        r"^```python\n(.*?)^```", TEXT[ROOT / "CONTRIBUTING.md"], re.DOTALL | re.MULTILINE
    )
    (tmp_path / "contributed_method.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    import contributed_method

    results = check_method(contributed_method.ResetLast)
    assert [r.name for r in results if r.state != "pass"] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", TEXT[page])
    for target in targets:
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


def test_no_file_names_a_folder_of_some_machine():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    folder = re.compile(r"(?<![\w.~-])/(home|root|work|Users)/")
    for name in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        found = folder.search(text)
        assert found is None, f"{name} holds {text[found.start() :][:60]!r}"

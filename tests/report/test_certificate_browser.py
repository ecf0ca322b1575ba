"""The certificate's page in Debian's chromium: fits, is quiet, reaches nowhere, can be read."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("cryptography")
from certificate_data import KINDS, evidence
from test_page_browser import CLIPPED, browser, contrast  # noqa: F401 - a fixture

from expunge.report.certificate import issue
from expunge.report.certificate_page import render_html
from expunge.report.keys import Key

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder, key = tmp_path_factory.mktemp("certificates"), Key.new()
    made = {kind: evidence(kind) for kind in KINDS}
    long = {"name": "layer." * 30 + "safetensors", "digest": {"sha256": "12" * 32}}
    made["crowded"] = replace(
        evidence("exact", problem="p" * 90), subjects=[*evidence().subjects, *[long] * 50],
        untested=["u" * 200],
    )  # fmt: skip
    paths = {}
    for name, one in made.items():
        paths[name] = folder / f"{name}.html"
        paths[name].write_text(render_html(issue(one, key)), encoding="utf-8")
    return paths


@pytest.mark.parametrize("name", [*KINDS, "crowded"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 390, 320])
def test_certificate_fits_is_quiet_and_stays_inside(browser, pages, name, scheme, width):  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, said = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: said.append(m.text))
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CLIPPED) == []
    assert [u for u in asked if not u.startswith(("file:", "data:"))] == [] and said == []
    *texts, paper = page.evaluate(
        """() => ['.kind', 'h1', '.soft, .note', '.list li', '.says', '.pairs dt', 'code']
          .map(s => getComputedStyle(document.querySelector(s)).color)
          .concat(getComputedStyle(document.body).backgroundColor)"""
    )
    for colour in texts:
        assert contrast(colour, paper) >= 4.5, (scheme, colour, paper)
    page.close()


def test_print_keeps_settings_and_hashes(browser, pages):  # noqa: F811
    page = browser.new_page(viewport={"width": 690, "height": 1000})
    page.goto(pages["exact"].as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 690
    shown = page.evaluate(
        "[...document.querySelectorAll('details dl')].filter(e => e.checkVisibility({contentVisibilityAuto: true})).length"
    )
    assert shown == 2
    page.close()

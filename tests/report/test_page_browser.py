"""The page in Debian's chromium: nothing scrolls sideways, overlaps, fails or reaches outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_data import make_data

from expunge.report import write_report

pytestmark = pytest.mark.browser
CHROMIUM = Path("/usr/bin/chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
OVERLAPS = """
() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    const frame = svg.getBoundingClientRect();
    const name = svg.querySelector('title').textContent;
    texts.forEach(([a, p], i) => {
      if (p.left < frame.left - 1 || p.right > frame.right + 1 || p.top < frame.top - 1 || p.bottom > frame.bottom + 1)
        found.push([name, a, 'outside']);
      texts.slice(i + 1).forEach(([b, q]) => {
        const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        if (wide > 0.5 && high > 0.5) found.push([name, a, b]);
      });
    });
  }
  return found;
}
"""
CLIPPED = """
() => [...document.querySelectorAll('h1, h2, h3, p, li, .word, .value, .sub, summary, dd, dt')]
  .filter(e => !e.closest('.wide table:not(.methods)') && e.getBoundingClientRect().width)
  .filter(e => { const r = e.getBoundingClientRect(); return r.left < -1 || (r.right > innerWidth + 1 && !e.closest('.wide')); })
  .map(e => e.textContent.slice(0, 60))
"""


def crowded():
    """Forty more methods close to each other, a hundred classes, names without a place to break."""
    data = make_data(1)
    one = data["comparisons"][0]
    base = next(r for r in one["rows"] if r["method"] == "ssd")
    one["rows"] += [
        {**base, "method": f"variant-{i}", "cost_ratio": 0.07 * 1.1 ** (i % 20)} for i in range(40)
    ]
    one["rows"].append({**base, "method": "m" * 60})
    one["title"] = "a-very-long-title-without-any-space-" * 4
    for row in one["rows"]:
        found = row["findings"]["accuracy/retain-test"]
        row["findings"]["accuracy/retain-test"] = found | {
            "detail": {"per_class": {str(c): [9, 10] for c in range(100)}}
        }
    return data


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip("no chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(CHROMIUM), args=QUIET)
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "usual": make_data(),
        "seeds": make_data(1, seeds=3),
        "alone": make_data(2, references=0),
        "crowded": crowded(),
    }
    return {name: write_report(data, folder, name)["html"] for name, data in made.items()}


@pytest.mark.parametrize("name", ["usual", "seeds", "alone", "crowded"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 390, 320])
def test_page_fits_is_quiet_and_stays_inside(browser, pages, name, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, said = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: said.append(m.text))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(CLIPPED) == []
    assert [u for u in asked if not u.startswith(("file:", "data:"))] == []
    assert len([u for u in asked if u.startswith("file:")]) == 1
    assert said == []
    heads = page.locator("h1, h2").all_inner_texts()
    assert heads[0] == "What was forgotten, and how far"
    assert heads[-2:] == ["How to read the findings", "Records and settings"]
    page.close()


def test_schemes_differ_and_text_has_contrast(browser, pages):
    seen = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(pages["usual"].as_uri())
        seen[scheme] = page.evaluate(
            """() => ['body', '.soft', '.sub', '.state-short .word', '.state-lost .word', '.state-matches .word', '.state-overshoot .word', 'svg text']
              .map(s => { const c = getComputedStyle(document.querySelector(s)); return s === 'svg text' ? c.fill : c.color; })
              .concat(getComputedStyle(document.body).backgroundColor)"""
        )
        page.close()
        *texts, paper = seen[scheme]
        for colour in texts:
            assert contrast(colour, paper) >= 4.5, (scheme, colour, paper)
    assert seen["light"] != seen["dark"]


def contrast(a: str, b: str) -> float:
    """WCAG contrast of two `rgb(r, g, b)`."""

    def luminance(text: str) -> float:
        parts = [int(p) / 255 for p in text[text.index("(") + 1 : -1].split(",")[:3]]
        lin = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * lin[0] + 0.7152 * lin[1] + 0.0722 * lin[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_print_shows_the_records_too(browser, pages):
    page = browser.new_page()
    page.goto(pages["usual"].as_uri())
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 690, "height": 1000})  # A4 within its margins
    assert page.evaluate("document.documentElement.scrollWidth") <= 690
    shown = page.evaluate(
        "[...document.querySelectorAll('details table, details pre')].filter(e => e.checkVisibility({contentVisibilityAuto: true})).length"
    )
    assert shown == page.locator("details table, details pre").count() > 0
    page.close()


def test_a_screen_reader_gets_words(browser, pages):
    page = browser.new_page()
    page.goto(pages["usual"].as_uri())
    figures = page.get_by_role("img")
    assert figures.count() == page.locator("svg").count() > 20
    assert page.get_by_role("img", name="Accuracy per class: ssd").count() == 2
    row = page.get_by_role("row", name="finetune").first
    assert "not forgotten" in row.inner_text()
    page.close()

"""The report in a real browser: it shows, filters, takes verdicts by keyboard, and gives them to the ledger."""

import json
import os
import shutil
import sys

import pytest
from playwright.sync_api import expect, sync_playwright

from trl_dt2it.curation import CurationLedger
from trl_dt2it.debias import audit_style
from trl_dt2it.demo.digits import make_digits
from trl_dt2it.report import write_report

from .run_folder import NASTY, NASTY_ID, NASTY_SOURCE, evaluation_file
from .test_sections import SECTIONS


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs Chromium in the PATH, such as Debian's package chromium"
)

# Smallest letters, also those in figures, and least contrast of all text that is seen.
LEGIBLE = """() => {
  const channel = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((value) => channel(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (one) => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$|transparent/.test(colour)) return colour;
    }
  };
  let smallest = Infinity, least = Infinity, where = "";
  for (const one of document.querySelectorAll("p, dt, dd, td, th, li span, button:enabled, h1, h2, svg text")) {
    const text = one.textContent.trim();
    if (!text || !one.checkVisibility() || one.closest("details:not([open]) > :not(summary)")) continue;
    const style = getComputedStyle(one);
    const matrix = one.ownerSVGElement && one.getScreenCTM();
    const scale = matrix ? Math.hypot(matrix.a, matrix.b) : 1; // labels of vertical axes are turned
    smallest = Math.min(smallest, parseFloat(style.fontSize) * scale);
    const [a, b] = [luminance(one.ownerSVGElement ? style.fill : style.color), luminance(background(one))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < least) [least, where] = [contrast, `${one.tagName} ${text.slice(0, 40)}`];
  }
  return { smallest, least, where, wide: document.documentElement.scrollWidth - innerWidth };
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Without its sandbox, which does not start as root; the page is our own.
        options = ["--no-sandbox"] if sys.platform == "linux" and os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(written_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "style.json").write_text(audit_style(make_digits("train", 300, style_bias=0.9)).to_json())
    given = {"evaluations": [evaluation_file(folder)], "style_before": folder / "style.json"}
    return write_report(folder / "report.html", run=written_run, **given)


@pytest.fixture
def opened(browser, report):
    """Opens the report, and sees to it that it fetched nothing and complained of nothing."""
    complaints, requests, contexts = [], [], []

    def open_page(width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        return page

    yield open_page
    assert complaints == []
    assert all(url == report.as_uri() or url.startswith(("data:", "blob:")) for url in requests), requests
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_all_is_there_and_legible(opened, width, scheme):
    page = opened(width, scheme)
    assert page.eval_on_selector_all("section", "all => all.map((one) => one.id)") == SECTIONS
    assert page.locator("section figure svg").count() == 7 and page.locator(".missing:visible").count() == 0
    assert page.locator(".card img").first.evaluate("one => one.decode().then(() => one.naturalWidth)") == 96
    found = page.evaluate(LEGIBLE)
    assert found["wide"] <= 0
    assert found["least"] >= 4.5, found  # WCAG 2, level AA
    assert found["smallest"] >= 9, found
    is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    assert is_dark == (scheme == "dark")


def test_markup_in_rows_is_text(opened):
    page = opened()
    assert page.evaluate("window.hacked") is None
    for number, text in NASTY.items():
        name = NASTY_ID if number == 0 else f"pair-{number}"
        card = page.locator(f".card[data-id={json.dumps(name)}]")
        assert card.locator(".prompt").evaluate("one => one.textContent").endswith(text)
    assert page.locator("#cards :is(b, i, script, svg, iframe)").count() == 0
    assert page.locator("figcaption", has_text="$x$ & co").first.inner_text().startswith(NASTY_SOURCE)


def test_filters(opened):
    page = opened()

    def shown():
        return page.eval_on_selector_all(".card", "all => all.map((one) => one.dataset.id)")

    def everything(*numbers):
        return {NASTY_ID if number == 0 else f"pair-{number}" for number in numbers}

    assert len(shown()) == 40 and shown()[:2] == [NASTY_ID, "pair-1"]
    page.select_option("#filter-state", "flipped")
    assert set(shown()) == everything(*range(8), 10)
    page.select_option("#filter-since", "round 2")
    assert set(shown()) == everything(10)
    page.select_option("#filter-since", "")
    page.fill("#filter-low", "2.5")
    page.fill("#filter-high", "3.5")
    assert shown() == ["pair-3", "pair-4", "pair-5", "pair-6", "pair-7"][: len(shown())] and len(shown()) == 5
    assert page.inner_text("#gallery-count") == "5 of 40 pairs shown"
    page.fill("#filter-text", "PAIR-6")
    assert shown() == ["pair-6"]
    page.click("button[type=reset]")
    expect(page.locator(".card")).to_have_count(40)  # the page's policy forbids scripts from without to wait for it
    page.select_option("#filter-source", NASTY_SOURCE)
    assert set(shown()) == everything(*range(20, 40))
    page.fill("#filter-text", "no such words")
    assert shown() == [] and page.inner_text("#gallery-count") == "0 of 40 pairs shown"


def test_verdicts_by_keyboard_go_into_the_ledger(opened, run, tmp_path):
    page = opened()
    assert page.is_disabled("#export")
    for key in "jawujjx":  # accept the first, the second is wrong, unsure about the third; 4 and 5 are looked at
        page.keyboard.press(key)
    assert page.inner_text("#gallery-progress") == "3 of the 9 strongest flips judged, 3 verdicts in all"
    assert page.locator(".card.current").get_attribute("data-id") == "pair-5"
    page.keyboard.press("w")
    page.keyboard.press("k")
    page.keyboard.press("x")  # taken back
    page.locator('.card[data-id="pair-39"] [data-verdict=wrong]').click()
    page.locator('.card[data-id="pair-20"] [data-verdict=wrong]').click()
    page.reload()  # verdicts stay
    assert page.locator('.card[data-id="pair-1"] [data-verdict=wrong]').get_attribute("aria-pressed") == "true"
    page.select_option("#filter-verdict", "wrong")
    assert page.locator(".card").count() == 3
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "corrections.json")
    ledger = CurationLedger(run / "ledger")
    counts = ledger.correct_from(tmp_path / "corrections.json")
    assert counts == {"keep": 2, "flip": 2, "drop": 0, "before": 0, "unsure": 1}
    state = {row["pair_id"]: (row["flipped"], row["kept"]) for row in ledger.state().to_pylist()}
    assert state[NASTY_ID] == (True, True) and state["pair-1"] == (False, True)
    assert state["pair-39"] == (False, True) and state["pair-20"] == (True, True)
    assert state["pair-2"] == state["pair-5"] == (True, True)

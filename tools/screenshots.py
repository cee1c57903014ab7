"""Screenshots for the documentation, made by `make screenshots` after `make demo` and `make docs`.

    python tools/screenshots.py report --report outputs/dt2it_digits/report.html
    python tools/screenshots.py site --site site

Parts of the report, and pages of the site as a reader opens them, at 1280 or 400 pixels, light or dark, go into
`docs/images/`. Needs `trl-dt2it[dev]` and Chromium in the PATH.
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from playwright.sync_api import Browser, sync_playwright


ROOT = Path(__file__).parents[1]
# Name, section, width, color scheme, most pixels of its height.
REPORT_SHOTS = (
    ("report-flow", "flow", 1280, "light", 730),
    ("report-style", "style", 1280, "light", 900),
    ("report-calibration", "calibration", 1280, "dark", 560),
    ("report-gallery", "gallery", 1280, "light", 900),
    ("report-telephone", "gallery", 400, "dark", 900),
)
# Name, page, width, colour scheme.
SITE_SHOTS = (
    ("docs-quickstart", "quickstart/", 1280, "light"),
    ("docs-measured", "measured/", 1280, "dark"),
    ("docs-reference", "api/training/", 1280, "light"),
    ("docs-telephone", "", 400, "dark"),
)
HEIGHT = 900
MARGIN = 24
# From the heading of a section to its end, on the page as a whole.
PLACE = """(name) => {
    const section = document.getElementById(name);
    const ends = [section.querySelector("h2").getBoundingClientRect().top, section.getBoundingClientRect().bottom];
    return ends.map((end) => end + scrollY);
}"""


def shoot_report(browser: Browser, report: Path, folder: Path) -> None:
    for name, section, width, scheme, most in REPORT_SHOTS:
        page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
        page.goto(report.resolve().as_uri())
        if section == "gallery" and page.locator(".card").count():
            page.keyboard.press("j")  # the first pair is the current one
        top, bottom = page.evaluate(PLACE, section)
        clip = {"x": 0, "y": top - MARGIN, "width": width, "height": min(most, bottom - top + MARGIN)}
        page.screenshot(path=folder / f"{name}.png", clip=clip, full_page=True)
        print(folder / f"{name}.png")
        page.close()


def shoot_site(browser: Browser, site: Path, folder: Path) -> None:
    with served(site) as address:
        for name, path, width, scheme in SITE_SHOTS:
            page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
            page.goto(f"{address}/{path}", wait_until="networkidle")
            page.screenshot(path=folder / f"{name}.png")
            print(folder / f"{name}.png")
            page.close()


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The site on this machine alone: opened as files, its links between folders do not work."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def main(what: str, report: Path, site: Path, folder: Path, browser: str | None) -> None:
    if what == "report" and not report.is_file():
        raise SystemExit(f"{report} is not there; make it with `make demo`, or name another with `--report`.")
    if what == "site" and not (site / "index.html").is_file():
        raise SystemExit(f"{site} holds no site; make it with `make docs`, or name another folder with `--site`.")
    found = browser or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise SystemExit("There is no Chromium in the PATH; install it, or name it with `--browser`.")
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start as root; the pages are our own.
        options = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=found, args=options)
        if what == "report":
            shoot_report(chromium, report, folder)
        else:
            shoot_site(chromium, site, folder)
        chromium.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("report", "site"))
    parser.add_argument("--report", type=Path, default=ROOT / "outputs/dt2it_digits/report.html")
    parser.add_argument("--site", type=Path, default=ROOT / "site")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--browser", help="Path of Chromium.")
    arguments = parser.parse_args()
    main(arguments.what, arguments.report, arguments.site, arguments.folder, arguments.browser)

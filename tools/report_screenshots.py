"""Screenshots of a report for the documentation, made by `make report-screenshots` after `make demo`.

    python tools/report_screenshots.py outputs/dt2it_digits/report.html

Each is a part of the page, at 1280 or 400 pixels, light or dark, in `docs/images/`. Needs `trl-dt2it[dev]` and
Chromium in the PATH.
"""

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


# Where `make demo` and the digits configuration leave theirs; the first that is there is taken.
REPORTS = (Path("outputs/demo/rounds/report.html"), Path("outputs/dt2it_digits/report.html"))
# Name, section, width, colour scheme, most pixels of its height.
SHOTS = (
    ("report-flow", "flow", 1280, "light", 730),
    ("report-calibration", "calibration", 1280, "dark", 560),
    ("report-gallery", "gallery", 1280, "light", 900),
    ("report-telephone", "gallery", 400, "dark", 900),
)
MARGIN = 24
# From the heading of a section to its end, on the page as a whole.
PLACE = """(name) => {
    const section = document.getElementById(name);
    const ends = [section.querySelector("h2").getBoundingClientRect().top, section.getBoundingClientRect().bottom];
    return ends.map((end) => end + scrollY);
}"""


def main(report: Path, folder: Path, browser: str | None) -> None:
    if not report.is_file():
        raise SystemExit(f"{report} is not there; make it with `make demo`, or name another report.")
    found = browser or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise SystemExit("There is no Chromium in the PATH; install it, or name it with `--browser`.")
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start as root; the page is our own.
        options = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=found, args=options)
        for name, section, width, scheme, most in SHOTS:
            page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto(report.resolve().as_uri())
            if section == "gallery" and page.locator(".card").count():
                page.keyboard.press("j")  # the first pair is the current one
            top, bottom = page.evaluate(PLACE, section)
            clip = {"x": 0, "y": top - MARGIN, "width": width, "height": min(most, bottom - top + MARGIN)}
            page.screenshot(path=folder / f"{name}.png", clip=clip, full_page=True)
            print(folder / f"{name}.png")
            page.close()
        chromium.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    first = next(filter(Path.is_file, REPORTS), REPORTS[0])
    parser.add_argument("report", type=Path, nargs="?", default=first)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "docs/images")
    parser.add_argument("--browser", help="Path of Chromium.")
    arguments = parser.parse_args()
    main(arguments.report, arguments.folder, arguments.browser)

"""The README's pictures: `python tests/browser/screenshots.py ADDRESS` while `make demo` trains, and again for the page
of the job once it is done.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parents[2] / "docs" / "img"


def main(address: str) -> None:
    with urllib.request.urlopen(f"{address}/api/jobs?limit=1") as answer:
        [job] = json.load(answer)["data"]
    pages = [("job", f"/jobs/{job['id']}", "dark")]
    if job["status"] == "running":
        pages = [("now", "/", "light")]
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as running:
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=sandbox)
        for name, path, scheme in pages:
            page = browser.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 860})
            page.goto(address + path)
            page.wait_for_selector("#loss .main-svg")
            page.wait_for_timeout(2000)  # the log and what is said last
            page.screenshot(path=IMAGES / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))

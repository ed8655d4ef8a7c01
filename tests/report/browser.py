"""Chromium without a window: what a page measures, and what it looks like."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LIGHT, DARK = (), ("--blink-settings=preferredColorScheme=0",)
_SANDBOX = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()

Picture = npt.NDArray[np.float64]

# Every element that says something, where it is, and how wide the page wants to be.
_MEASURE = """
const page = document.getElementById("page").contentDocument, root = page.documentElement;
const boxes = [...page.querySelectorAll("h1, h2, svg, table, figcaption, pre, summary")].map(element => {
  const box = element.getBoundingClientRect();
  return {tag: element.localName, text: element.textContent.trim().slice(0, 80), x: box.x, y: box.y,
          width: box.width, height: box.height};
});
const texts = [...page.querySelectorAll("svg text")].map(element => element.getBoundingClientRect().height);
document.body.dataset.measured = JSON.stringify(
  {wanted: root.scrollWidth, there: root.clientWidth, height: root.scrollHeight, boxes, letters: Math.min(...texts),
   scripts: window.ran || page.defaultView.ran || false});
"""


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """Shows a page in a frame of a given width, narrower than a window may be.

    Args:
        folder: an empty one, for what the browser keeps.
    """

    def __init__(self, executable: str, folder: Path) -> None:
        self._executable, self._folder = executable, folder

    def measure(self, page: bytes, width: int) -> dict[str, Any]:
        """Boxes of the elements in CSS pixels, the width the page wants and has, and its height."""
        dom = self._run(self._framed(page, width, 2000), "--dump-dom")
        found = re.search(r'data-measured="([^"]*)"', dom)
        assert found, dom[:2000]
        return dict(json.loads(html.unescape(found[1])))

    def picture(self, page: bytes, width: int, height: int, options: tuple[str, ...] = LIGHT) -> Picture:
        """The page as grey values [height, width], 0 black and 1 white."""
        from matplotlib.image import imread

        shot = self._folder / "shot.png"
        window = f"--window-size={max(width, 600)},{height}"
        self._run(self._framed(page, width, height), f"--screenshot={shot}", window, *options)
        colours = imread(shot)[:height, :width, :3]
        assert colours.shape[:2] == (height, width)
        grey: Picture = colours.mean(-1)
        return grey

    def _framed(self, page: bytes, width: int, height: int) -> Path:
        path = self._folder / "framed.html"
        size, text = f"width:{width}px;height:{height}px", html.escape(page.decode())
        frame = f'<iframe id="page" style="border:0;{size}" srcdoc="{text}"></iframe>'
        script = f"<script>onload = () => {{{_MEASURE}}}</script>"
        path.write_text(f'<!DOCTYPE html><body style="margin:0">{frame}{script}</body>')
        return path

    def _run(self, path: Path, *options: str) -> str:
        command = [self._executable, "--headless=new", *_SANDBOX, "--disable-gpu", "--hide-scrollbars"]
        command += ["--force-device-scale-factor=1", f"--user-data-dir={self._folder / 'profile'}"]
        # All stages of drawing, however busy the machine: else a screenshot may catch a page that is half drawn.
        command += ["--run-all-compositor-stages-before-draw", "--virtual-time-budget=5000"]
        command += ["--no-first-run", "--disable-background-networking", *options, path.as_uri()]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

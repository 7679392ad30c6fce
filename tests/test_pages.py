import io
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from nnunet_ssl.pages import write_page

TEXT = "# A run\n\n| what | value |\n|---|---|\n| loss | 0.5 |\n\n![curve](curve.png)\n\n```yaml\nsteps: 4\n```\n"


@pytest.fixture
def page(tmp_path):
    drawing = Figure(figsize=(4, 3))
    drawing.subplots().plot([0, 1, 2], [3, 1, 2], color="red", linewidth=8)
    drawing.savefig(tmp_path / "curve.png")
    write_page(tmp_path / "report.html", TEXT, "A run")
    (tmp_path / "curve.png").unlink()
    return tmp_path / "report.html"


def test_a_page_needs_nothing_beside_itself(page):
    html = page.read_text()
    assert "<td>0.5</td>" in html and "steps: 4" in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)


def test_a_page_is_what_it_says_whatever_the_locale_and_the_title(tmp_path):
    """In a locale of another encoding the report would not be UTF-8, or end the training that writes it."""
    code = "import sys; from pathlib import Path; from nnunet_ssl.pages import write_page; "
    code += r"write_page(Path(sys.argv[1]), 'R\u00f6ntgen \u2212 \u0160', 'A <b> & C \u2212 D')"
    elsewhere = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", code, tmp_path / "report.html"], env=elsewhere, check=True)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<p>R\u00f6ntgen \u2212 \u0160</p>" in html
    assert "<title>A &lt;b&gt; &amp; C \u2212 D</title>" in html


def test_a_picture_that_is_not_there_is_an_error_and_leaves_no_page(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"curve\.png"):
        write_page(tmp_path / "report.html", TEXT, "A run")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium (Debian: apt install chromium)")
def test_a_browser_shows_text_and_picture(page, tmp_path):
    shot = tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,900", f"--screenshot={shot}"]
    shown = subprocess.run(["chromium", *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert shot.is_file(), shown.stderr
    assert "Uncaught" not in shown.stderr
    pixels = imread(io.BytesIO(shot.read_bytes()))[..., :3]
    red = (pixels[..., 0] > 0.8) & (pixels[..., 1:].max(axis=-1) < 0.3)
    dark = pixels.max(axis=-1) < 0.4
    assert red.sum() > 500, "the picture's curve is not there"
    assert dark.sum() > 500, "the text is not there"
    assert np.median(pixels) == 1

"""Reports that a browser opens without a network: Markdown as one HTML file that holds its pictures."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from nnunet_ssl.files import written_beside

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2329; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; display: block; overflow: auto; }
th, td { border-bottom: 1px solid #d5dae0; padding: .3rem .8rem; text-align: left; }
pre { background: #f4f6f8; padding: .8rem; overflow: auto; font-size: 14px; }
"""


def write_page(path: Path, markdown: str, title: str) -> None:
    """Write Markdown as a page; PNG files that it shows are looked for beside `path` and become part of it.

    Raises:
        FileNotFoundError: a picture is not there.
    """
    from markdown import markdown as as_html

    body = as_html(markdown, extensions=["tables", "fenced_code"])
    body = re.sub(r'src="([^":]+\.png)"', lambda found: f'src="{_embedded(path.parent / found[1])}"', body)
    with written_beside(path) as temporary:
        temporary.write_text(
            f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>\n'
            f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n",
            encoding="utf-8",
        )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a table as lines of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _embedded(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"

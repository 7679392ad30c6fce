"""What the site shows that is written elsewhere: the README as its first page, commands' help, settings."""

from __future__ import annotations

import importlib.metadata
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from settings_tables import with_tables

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}
"""Pages that lie at the top of the repository, by their names in the site."""

CONSOLE = """\
import sys
from importlib.metadata import entry_points
(command,) = entry_points(group="console_scripts", name=sys.argv[1])
main, sys.argv = command.load(), sys.argv[1:]
main()
"""
"""Runs a console command of this installation, whether it is on the PATH or not."""


def on_config(config: MkDocsConfig) -> None:
    """Give every command a page of its own."""
    reference = next(section for section in config.nav if "Reference" in section)
    pages = [{name: page_of(name)} for name in commands()]
    reference["Reference"].append({"Commands": pages})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are no files of docs/."""
    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    for name, call in commands().items():
        files.append(File.generated(config, page_of(name), content=manual(name, call)))


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Put in the tables of settings, and turn links into the repository into links of the site."""
    source = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = re.split(r"(^```.*?^```)", with_tables(markdown), flags=re.M | re.S)
    parts[::2] = [  # the others are code
        re.sub(
            r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#]*)(#[^)]*)?\)",
            lambda link: linked(link[1], posixpath.join(posixpath.dirname(source), link[2]), link[3] or "", page),
            part,
        )
        for part in parts[::2]
    ]
    return "".join(parts)


def on_page_content(html: str, **_) -> str:
    """Leave out the roles of reStructuredText in docstrings, which stay before the code that they mark."""
    return re.sub(r":(?:class|data|func|meth|mod):(?=<code>)", "", html)


def linked(text: str, path: str, anchor: str, page: Page) -> str:
    """A link to a file of the repository: within the site, or the text alone where the site does not have it."""
    path = posixpath.normpath(path)
    by_source = {source: name for name, source in ELSEWHERE.items()}
    if path not in by_source and not path.startswith("docs/"):
        return f"`{text.strip('`')}`"
    target = by_source.get(path, path.removeprefix("docs/"))
    return f"[{text}]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"


def commands() -> dict[str, list[str]]:
    """By name: how every command of the package is called here."""
    scripts = sorted((ROOT / "dataset_conversion").glob("Dataset*.py"))
    points = sorted(point.name for point in importlib.metadata.distribution("nnunet_ssl").entry_points)
    return (
        {name: ["-c", CONSOLE, name] for name in points if name.startswith("nnssl_")}
        | {script.name: [str(script)] for script in scripts}
        | {f"python -m nnunet_ssl.{name}": ["-m", f"nnunet_ssl.{name}"] for name in ("phantom", "deployment")}
    )


def page_of(name: str) -> str:
    return f"commands/{name.split('.')[-1] if ' ' in name else name.removesuffix('.py')}.md"


def manual(name: str, call: list[str]) -> str:
    """Write a command's page: its help, and that of its subcommands."""
    text = help_of(call)
    parts = [f"# {name}", f"```text\n{text}```"]
    found = re.search(r"^usage: .*?\s(\w+(?:\s+\|\s+\w+)+)\s+\.\.\.", text, re.S)
    for subcommand in re.findall(r"\w+", found[1]) if found else ():
        parts += [f"## {name} {subcommand}", f"```text\n{help_of([*call, subcommand])}```"]
    return "\n\n".join(parts)


def help_of(call: list[str]) -> str:
    return subprocess.run(
        [sys.executable, *call, "--help"],
        env=os.environ | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout

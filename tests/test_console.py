"""How console commands end."""

import subprocess
import sys
import textwrap

import pytest

from nnunet_ssl.console import OptionParser

COMMAND = """
import logging
from nnunet_ssl.console import command
from nnunet_ssl.errors import UserError

@command
def main():
    {body}

main()
"""


def run(body, **options):
    code = COMMAND.format(body=textwrap.indent(textwrap.dedent(body), "    ").strip())
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_closed_pipe_ends_a_command_quietly_and_at_once(tmp_path):
    process = run(f"""
        for number in range(100_000):
            logging.getLogger("lines").info("line %d", number)
        open({str(tmp_path / "end")!r}, "w").close()
    """)
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
    assert not (tmp_path / "end").exists()


@pytest.mark.parametrize(
    ("body", "last"),
    [
        ("raise UserError('There is no scan. Add one.')", "error: There is no scan. Add one."),
        ("open('/nowhere/at/all')", "error: [Errno 2] No such file or directory: '/nowhere/at/all'"),
        ("raise KeyboardInterrupt", "interrupted"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_1(body, last):
    process = run(body)
    output, errors = process.communicate()
    assert (output, errors, process.returncode) == ("", f"{last}\n", 1)


def test_a_bug_shows_its_traceback():
    process = run("raise KeyError('oops')")
    _, errors = process.communicate()
    assert errors.startswith("Traceback") and process.returncode == 1


@pytest.mark.parametrize("spelled", ["--dry_run", "--dry-run", "--dry-r"])
@pytest.mark.parametrize("words", [[], ["sub"]])
def test_options_have_underscores_as_nnunets_and_hyphens_do_as_well(spelled, words):
    parser = OptionParser()
    asked = parser.add_subparsers().add_parser("sub") if words else parser
    asked.add_argument("--dry_run", action="store_true")
    asked.add_argument("--skull_strip")
    asked.add_argument("values", nargs="*")
    given = parser.parse_args([*words, spelled, "--skull-strip=hd-bet", "a-b", "c-d=-e"])
    assert (given.dry_run, given.skull_strip, given.values) == (True, "hd-bet", ["a-b", "c-d=-e"])
    assert "--skull_strip" in asked.format_help() and "--skull-strip" not in asked.format_help()

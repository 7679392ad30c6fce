import io
import logging
import sys

import pytest

from nnunet_ssl.live import live_line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    with live_line("Counting", 10, unit="step", **options) as line:
        line.set_postfix(failed=2, refresh=False)
        line.update(4)
    return stream.getvalue()


@pytest.mark.parametrize("stream", [Terminal, io.StringIO], ids=["terminal", "file"])
def test_the_line_tells_progress_rate_and_what_to_look_at_and_counts_from_where_the_work_goes_on(monkeypatch, stream):
    last = shown(monkeypatch, stream(), done=6).rstrip().rsplit("\r", 1)[-1]
    assert last.startswith("Counting: 100%")
    assert "10/10" in last
    assert "step/s" in last
    assert "failed=2" in last


def test_a_line_that_is_not_to_be_shown_prints_nothing(monkeypatch):
    assert shown(monkeypatch, Terminal(), shown=False) == ""


def test_nothing_to_do_is_no_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with live_line("Counting", 0, unit="step") as line:
        line.update(0)
    assert stream.getvalue() == ""


def test_the_log_passes_above_the_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    logger = logging.getLogger("of_a_command")
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(sys.stdout)])
    with live_line("Counting", 10, unit="step"):
        logger.warning("a message")
    assert out.getvalue() == "a message\n"

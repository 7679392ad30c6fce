import io
import sys

from nnunet_ssl.pretraining.run.speed import live_line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_live_line_is_for_terminals_and_counts_from_where_the_run_goes_on(monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with live_line(6, 10) as line:
            line.update(4)
        assert ("10/10" in stream.getvalue() and "step" in stream.getvalue()) == shown

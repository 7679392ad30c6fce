"""A folder that one process works on at a time."""

import signal
import subprocess
import sys
import textwrap

import pytest

from nnunet_ssl import files
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import locked

HOLDER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from nnunet_ssl.files import locked

    with locked(Path(sys.argv[1]), "nnssl_pretrain"):
        if os.fork() == 0:  # as a DataLoader forks its workers
            time.sleep(2)
            os._exit(0)
        print("held", flush=True)
        time.sleep(60)
    """
)


def test_a_lock_falls_with_a_killed_process_and_its_forked_workers_and_not_before(tmp_path, monkeypatch):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Another nnssl_pretrain is at work on"):
        patch.setattr(files, "LOCK_PATIENCE_S", 0)
        with locked(tmp_path, "nnssl_pretrain"):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path, "nnssl_pretrain"):
        pass

"""What nnssl_demo takes, step by step: seconds of the clock and of the processors, as a new user would wait for it.

python benchmarks/demo.py -w /tmp/demo -device cpu
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from tables import markdown

DEMO = "from nnunet_ssl.demo.cli import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-w", type=Path, required=True, metavar="FOLDER", help="a new one, for all that the demo writes"
    )
    parser.add_argument("-device", default="cpu")
    arguments = parser.parse_args()
    if arguments.w.exists():
        parser.error(f"{arguments.w} is there: the demo would go on where it stopped, and not be measured whole")
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", DEMO, "-w", str(arguments.w), "-device", arguments.device], check=True)
    whole = time.monotonic() - started
    marks = sorted((arguments.w / "logs").glob("*.json"))
    steps = {mark.stem: json.loads(mark.read_text())["seconds"] for mark in marks}
    rows = [*steps.items(), ("start and end", whole - sum(steps.values())), ("all", whole)]
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} over the last five minutes")
    print(markdown(pd.DataFrame(rows, columns=["step", "s"]).astype({"s": float}), decimals=0))
    print(f"{(spent.ru_utime + spent.ru_stime) / 60:.1f} minutes of the processors")


if __name__ == "__main__":
    main()

"""Losses that were recorded once, and how far a run may stray from them."""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).parents[1] / "golden" / "losses.json"
DIGITS = 7  # as many as float32 has
TOLERANCE = 2e-3
"""Absolute. tests/golden/README.md tells what was measured on either side of it."""
RENEW = "If that is meant, renew them as tests/golden/README.md says, and tell why in the commit."


def recorded() -> dict[str, dict[str, list[float]]]:
    """Losses step by step, by run and by name."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def record(run: str, losses: dict[str, list[float]]) -> None:
    """Put a run's losses into the file, one line for each name."""
    rounded = {name: [float(f"{value:.{DIGITS}g}") for value in values] for name, values in losses.items()}
    runs = recorded() | {run: rounded}
    blocks = [
        f'"{run}": {{\n' + ",\n".join(f'  "{name}": {values}' for name, values in sorted(runs[run].items())) + "\n}"
        for run in sorted(runs)
    ]
    FILE.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def assert_recorded(run: str, losses: dict[str, list[float]]) -> None:
    """Compare a run's losses with those of the file, which are of the order of 1."""
    expected = recorded().get(run)
    assert expected is not None, f"tests/golden/losses.json has no run '{run}'. {RENEW}"
    assert losses.keys() == expected.keys(), f"the losses of '{run}' have other names. {RENEW}"
    for name, values in losses.items():
        assert np.shape(values) == np.shape(expected[name]), f"{run}, {name}: another number of steps. {RENEW}"
        strays = np.abs(np.subtract(values, expected[name]))
        off = int(np.argmax(~(strays <= TOLERANCE)))
        assert (strays <= TOLERANCE).all(), (
            f"{run}, {name}: from step {off} on the losses are others: {values[off]:.6g}, recorded were "
            f"{expected[name][off]:.6g}; "
            f"the largest difference is {strays.max():.1e}, allowed are {TOLERANCE:.0e}. {RENEW}"
        )

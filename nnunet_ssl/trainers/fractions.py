"""Train on a part of the training subjects: smaller parts lie inside larger ones."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np


def subject_of(case: str) -> str:
    """Return the BIDS subject in a case identifier (``sub-r001s001_ses-1`` -> ``sub-r001s001``), else all of it."""
    match = re.search(r"sub-[A-Za-z0-9]+", case)
    return match.group() if match else case


def nested_subset(cases: Sequence[str], fraction: int, seed: int) -> list[str]:
    """Return the cases of `fraction` per cent of the subjects, at least one, in the order given.

    Subjects are put into one seeded order and the first of them kept, so that 25 % is inside 50 % is inside 75 %.
    """
    subjects = sorted({subject_of(case) for case in cases})
    order = np.random.default_rng(seed).permutation(len(subjects))
    kept = {subjects[i] for i in order[: max(1, math.ceil(len(subjects) * fraction / 100))]}
    return [case for case in cases if subject_of(case) in kept]

"""One vocabulary for MRI contrasts, and how other vocabularies map onto it."""

from __future__ import annotations

import re

UNKNOWN = "unknown"
MODALITIES = ("t1", "t1c", "t2", "flair", "pd", "t2s", "swi", "dwi", "adc", UNKNOWN)
"""Every name a manifest may use; a scan's modality number is its place here."""

# Keys are lower case without punctuation: BIDS suffixes, FOMO stems, and the spellings met in nnssl collections.
_SYNONYMS = {
    "t1": "t1", "t1w": "t1", "inplanet1": "t1", "mprage": "t1", "mp2rage": "t1", "unit1": "t1", "spgr": "t1",
    "t1c": "t1c", "t1ce": "t1c", "t1gd": "t1c", "t1wce": "t1c", "t1wgd": "t1c", "t1post": "t1c", "t1km": "t1c",
    "t2": "t2", "t2w": "t2", "inplanet2": "t2",
    "flair": "flair", "t2flair": "flair", "t2wflair": "flair", "fla": "flair",
    "pd": "pd", "pdw": "pd",
    "t2s": "t2s", "t2star": "t2s", "t2starw": "t2s", "gre": "t2s",
    "swi": "swi",
    "dwi": "dwi", "trace": "dwi",
    "adc": "adc",
}  # fmt: skip


def modality_of(name: str) -> str:
    """Return the vocabulary's word for `name` (``"T1w"`` -> ``"t1"``, ``"T2*"`` -> ``"t2s"``), else ``"unknown"``."""
    return _SYNONYMS.get(re.sub(r"[^a-z0-9]", "", name.lower().replace("*", "star")), UNKNOWN)

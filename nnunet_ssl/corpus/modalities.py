"""One vocabulary for MRI contrasts, and how other vocabularies map onto it."""

from __future__ import annotations

import re

UNKNOWN = "unknown"
MODALITIES = ("t1", "t1c", "t2", "flair", "pd", "t2s", "swi", "dwi", "adc", UNKNOWN)
"""Every name a manifest may use; a scan's modality number is its place here."""

# Keys are lower case without punctuation: BIDS suffixes, FOMO stems, and the spellings met in nnssl collections.
SYNONYMS = {
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


_ENTITY = re.compile(r"(sub|ses|acq|run|ce|rec|dir|echo|inv|part|flip|mt|mod|task|space|res|den|hemi|chunk|bp)-", re.I)
_DERIVED = re.compile(r"(mask|seg|rois?|labels?|lesions?|parc|aparc.*|atlas|tissues?|pve|warp|bias ?field)\d*$", re.I)
_NOT_BRAIN = re.compile(r"spine|spinal|(?<![a-z])cord|cervical|thoracic|lumbar|sacral|knee|abdom|pelvi|cardiac", re.I)


def is_derived(stem: str) -> bool:
    """Tell by a file's name, without its ending, whether somebody drew or computed it: a label map or a field, no scan.

    ``sub-1_T1w_lesion``, ``sub-1_T1map_ROI1``, ``sub-1_aparc+aseg``, ``sub-1_label-WM_probseg``, ``brainmask``; the
    names of subject, session and acquisition may hold any word.
    """
    parts = [part for part in stem.split("_") if not _ENTITY.match(part)]
    if any(part.lower().startswith("label-") for part in parts):
        return True
    return any(_DERIVED.search(word) for part in parts for word in re.split(r"[^A-Za-z0-9]+", part))


def is_not_of_the_brain(words: str) -> bool:
    """Tell whether a description (a file's name without subject and session, or DICOM's BodyPartExamined) names
    another part of the body."""
    return bool(_NOT_BRAIN.search(words))


def modality_of(name: str) -> str:
    """Return the vocabulary's word for `name` (``"T1w"`` -> ``"t1"``, ``"T2*"`` -> ``"t2s"``), else ``"unknown"``."""
    return SYNONYMS.get(re.sub(r"[^a-z0-9]", "", name.lower().replace("*", "star")), UNKNOWN)

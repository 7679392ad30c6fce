"""What the releases of ATLAS share: one T1 a session, and masks of its lesions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_ssl.conversion.discovery import ImageFile, Skipped, choose_one, find_images, lesion_masks, refuse_two_homes

KINDS = {"t1w": "t1", "t1": "t1", "mask": "mask", "msk": "mask", "seg": "mask", "lesion": "mask"} | dict.fromkeys(
    ("t1c", "t2w", "t2", "flair", "pd", "swi", "t2star", "dwi", "adc", "bold", "mni152nlin2009asym"), "other"
)


@dataclass(frozen=True, kw_only=True)
class Session:
    """One session of a subject: `scan_id` is its name, `masks` are those of its lesions."""

    scan_id: str
    image: ImageFile
    masks: list[ImageFile]

    @property
    def subject(self) -> str:
        return self.image.entity("sub") or self.scan_id

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"{len(self.masks)} lesion masks united",) if len(self.masks) > 1 else ()


@dataclass
class Found:
    """What lies below a folder: sessions with a T1, sessions without, all images, and files that are no use."""

    sessions: list[Session] = field(default_factory=list)
    incomplete: list[Skipped] = field(default_factory=list)
    images: list[ImageFile] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def find_sessions(root: Path, images_only: bool, refusal: Callable[[ImageFile], str | None] | None = None) -> Found:
    """Find the T1 images below `root` and, but for `images_only`, their lesion masks.

    Among new images, one whose name says nothing is taken for a T1.

    Args:
        root: the folder to search.
        images_only: look for new images.
        refusal: says why an image is not to be used, None for one that is.

    Raises:
        UserError: there is no such folder, or two folders hold images of one name.
    """
    images, skipped = find_images(root)
    found = Found(images=images, skipped=skipped)
    wanted = ("t1", "unnamed") if images_only else ("t1", "mask")
    sessions: dict[str, dict[str, list[ImageFile]]] = defaultdict(lambda: defaultdict(list))
    for image in images:
        kind = image.kind(KINDS) or "unnamed"
        reason = None if kind in wanted else f"not a T1{'' if images_only else ' or a lesion mask'} by its name"
        reason = reason or (refusal(image) if refusal else None)
        if reason is None:
            sessions[image.scan_id(KINDS)][kind].append(image)
        else:
            skipped.append(Skipped(image.relative, reason))
    for scan_id, files in sorted(sessions.items()):
        masks = lesion_masks(files["mask"])
        candidates = files["t1"] or files["unnamed"]
        if not candidates:
            found.incomplete.append(Skipped(scan_id, "a mask without T1 image"))
            continue
        refuse_two_homes(scan_id, candidates, KINDS)
        image, others = choose_one(candidates, masks[0] if masks else None)
        others += files["unnamed"] if files["t1"] else []
        skipped += [Skipped(other.relative, f"{image.path.name} is used for {scan_id}") for other in others]
        found.sessions.append(Session(scan_id=scan_id, image=image, masks=masks))
    return found

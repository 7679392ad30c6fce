"""What lies in a folder: NIfTI images with subject and session, and what can't be used, each with its reason."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import RECORDS

_ANNEX_HINT = "git-annex link without content; fetch it with `datalad get` or `git annex get`"
_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_CONTENT_FOLDERS = frozenset(
    ("anat", "dwi", "perf", "rawdata", "sourcedata", "derivatives", "images", "labels", "masks", "labels_derivatives")
)
"""Folders that say what lies in them, not whose it is: one patient's files may lie in several of them."""


@dataclass(frozen=True)
class ImageFile:
    """A NIfTI file, seen by its name only.

    Attributes:
        path: where it lies.
        folders: the names of the folders above it, from the searched folder's own name down.
    """

    path: Path
    folders: tuple[str, ...]

    @property
    def relative(self) -> str:
        """Return the path below the searched folder."""
        return "/".join([*self.folders[1:], self.path.name])

    @property
    def stem(self) -> str:
        """Return the name without ``.nii`` or ``.nii.gz``."""
        return _NIFTI.sub("", self.path.name)

    @property
    def words(self) -> tuple[str, ...]:
        """Return the name's pieces in lower case: ``sub-01_ses-1_T1w`` -> ``sub 01 ses 1 t1w``."""
        return tuple(re.split(r"[\W_]+", self.stem.lower()))

    def entity(self, key: str) -> str | None:
        """Return the BIDS entity ``key-value`` from the file's name, or else from the closest folder's."""
        for name in (self.stem, *reversed(self.folders)):
            found = re.search(rf"(?:^|_){key}-([A-Za-z0-9]+)", name)
            if found:
                return f"{key}-{found[1]}"
        return None

    def kind(self, words: Mapping[str, str]) -> str | None:
        """Return what the file is: the meaning of the last word of its name that `words` knows."""
        return next((words[word] for word in reversed(self.words) if word in words), None)

    def scan_id(self, words: Mapping[str, str]) -> str:
        """Return the name of the case: subject and session, or else its folders and what a free name says but its kind.

        All folders belong to a free name, for patients' files may be called alike: ``A/scan_dwi`` -> ``A_scan``. One
        that the name repeats is not said twice: ``Smith/Smith_dwi`` -> ``Smith``.
        """
        subject, session = self.entity("sub"), self.entity("ses")
        if subject:
            return f"{subject}_{session}" if session else subject
        stem = self.stem.removesuffix(self.channel_number(words))
        pieces = [piece for piece in re.split(r"[_\s]+", stem) if piece and piece.lower() not in words]
        name = _plain("_".join(pieces))
        for folder in map(_plain, reversed(self.home(words))):
            if f"_{folder}_" not in f"_{name}_":
                name = f"{folder}_{name}" if name else folder
        return name or _plain(self.folders[0])

    def channel_number(self, words: Mapping[str, str]) -> str:
        """Return nnU-Net's channel number, with which a free name may end, or nothing.

        It is the only channel's, 0000, or stands behind the contrast; other digits are a patient's.
        """
        found = re.fullmatch(r"(?:.*[_\s])?([^_\s]+)[_\s]+(\d{4})", self.stem)
        return found[2] if found and (found[2] == "0000" or found[1].lower() in words) else ""

    def home(self, words: Mapping[str, str]) -> tuple[str, ...]:
        """Return the folders below the searched one that may tell whose the image is, but for BIDS' own.

        Left out are those that name what they hold (``anat``, or ``flair`` above a FLAIR) and, of an image of a
        ``sub-X``, the folders ``sub-X`` and ``ses-Y`` themselves.
        """
        subject, kind = self.entity("sub"), self.kind(words)
        said = (subject, self.entity("ses")) if subject else ()
        return tuple(
            name
            for name in self.folders[1:]
            if name not in said
            and name.lower() not in _CONTENT_FOLDERS
            and (kind is None or words.get(name.lower()) != kind)
        )


@dataclass(frozen=True)
class Skipped:
    """A file or a case that is left out, and why."""

    what: str
    reason: str


def find_images(root: Path) -> tuple[list[ImageFile], list[Skipped]]:
    """List the readable NIfTI files below a folder, sorted, and the other files with the reason they are no use.

    Hidden folders (``.git``) are not entered, nor are folders that a conversion wrote. Where an image lies there
    compressed and uncompressed, the compressed one is taken.

    Raises:
        UserError: the folder doesn't exist, or every image in it is a dangling link.
    """
    if root.is_file():
        raise UserError(f"{root} is a file, not a folder. Unpack it, and give the folder that holds the data with -i.")
    if not root.is_dir():
        raise UserError(f"There is no folder {root}. Give the folder that holds the data set with -i.")
    images, skipped = [], []
    root = root.absolute()
    for path in _files_below(root):
        folders = (root.name, *path.parent.relative_to(root).parts)
        reason = _why_unusable(path)
        if reason is None:
            images.append(ImageFile(path, folders))
        else:
            skipped.append(Skipped(str(path.relative_to(root)), reason))
    dangling = sum(item.reason == _ANNEX_HINT for item in skipped)
    if dangling and not images:
        raise UserError(
            f"All {dangling} images in {root} are git-annex links without content: the repository was cloned, but its "
            f"data not fetched. Run `datalad get .` (or `git annex get .`) in {root} first."
        )
    return images, skipped


def choose_one(files: list[ImageFile], like: ImageFile | None) -> tuple[ImageFile, list[ImageFile]]:
    """Choose one of several images of a kind: that whose name shares most words with `like`, else the first.

    Returns:
        the chosen one and the others.
    """
    wanted = Counter(like.words) if like else Counter()
    ranked = sorted(files, key=lambda file: (-(Counter(file.words) & wanted).total(), str(file.path)))
    return ranked[0], ranked[1:]


def refuse_two_homes(scan_id: str, files: Iterable[ImageFile], words: Mapping[str, str]) -> None:
    """Make sure that a case's images come from one place and have one number, lest two patients become one case.

    Args:
        scan_id: the case that all of `files` are named for.
        files: its images of all kinds.
        words: what the words of a name mean.

    Raises:
        UserError: they lie below different folders, or differ by a number, which may be those of two patients.
    """
    files = list(files)
    homes = {file.home(words): file for file in files}
    numbers = {file.channel_number(words): file for file in files if files[0].kind(words) == file.kind(words)}
    if len(numbers) > 1 and not files[0].entity("sub"):
        first, second = (file.relative for file in list(numbers.values())[:2])
        raise UserError(
            f"{first} and {second} differ by their number alone and would both belong to the case {scan_id}: are they "
            "two patients? Give them names of their own (sub-X)."
        )
    if len(homes) > 1:
        first, second = (file.relative for file in list(homes.values())[:2])
        raise UserError(
            f"{first} and {second} would both belong to the case {scan_id}, but lie in different folders: are they two "
            "patients, or two visits? Give them names of their own (sub-X, ses-Y), or hide what shall not be used in a "
            "folder whose name starts with a dot."
        )


def choose_images(
    scan_id: str,
    files: Mapping[str, list[ImageFile]],
    needed: Sequence[str],
    words: Mapping[str, str],
    skipped: list[Skipped],
    *,
    like: Mapping[str, ImageFile] | None = None,
) -> dict[str, ImageFile]:
    """Choose the image of each kind that a case needs; the others of these kinds are added to `skipped`.

    Args:
        scan_id: the case.
        files: its images, by kind.
        needed: the kinds.
        words: what the words of a name mean.
        skipped: what is left out.
        like: by kind, an image whose name the chosen one's is to resemble, as a mask's; see :func:`choose_one`.

    Raises:
        UserError: the images may be of two patients, see :func:`refuse_two_homes`.
    """
    refuse_two_homes(scan_id, [image for kind in needed for image in files[kind]], words)
    images = {}
    for kind in needed:
        images[kind], others = choose_one(files[kind], like=(like or {}).get(kind))
        skipped += [Skipped(other.relative, f"{images[kind].path.name} is used for {scan_id}") for other in others]
    return images


def lesion_masks(files: list[ImageFile]) -> list[ImageFile]:
    """Return the masks that aren't brain masks."""
    return [file for file in files if "brain" not in file.stem.lower()]


def nothing_found(
    root: Path, images: list[ImageFile], left_out: list[Skipped], *, name: str, expected: str, images_only: bool
) -> UserError:
    """Return the error for a folder without a case: what was expected there, what was found, and the first reason.

    Args:
        root: the searched folder.
        images: what was found there.
        left_out: cases that can't be used.
        name: of the data set.
        expected: examples of its files.
        images_only: new images were looked for, not the data set.
    """
    trouble = "holds no case that can be prepared" if images_only else f"doesn't hold {name}"
    reason = f" {left_out[0].what}: {left_out[0].reason}." if left_out else ""
    found = describe_contents(images, root)
    return UserError(f"{root} {trouble}. Expected were files like {expected}; found: {found}.{reason}")


def describe_contents(images: list[ImageFile], root: Path) -> str:
    """Say in one clause what was found in a folder that is not the data set it should be."""
    if not images:
        archives = sorted(
            path.name for path in root.iterdir() if path.name.endswith((".tar.gz", ".zip", ".tgz", ".7z"))
        )
        return f"no NIfTI image but the archive {archives[0]}: unpack it first" if archives else "no NIfTI image"
    return f"{len(images)} NIfTI images such as {images[0].relative}"


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder in sorted order, but for conversions' results.

    Links to folders are followed; each folder is entered once.
    """
    entered = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered or Path(parent, *RECORDS).is_dir():
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files))


def _plain(name: str) -> str:
    """Return a name with nothing in it but letters, digits, hyphens and underscores."""
    return re.sub(r"[^\w-]+", "-", re.sub(r"\s+", "_", name))


def _why_unusable(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden file"
    if not _NIFTI.search(path.name):
        return "not a NIfTI image"
    if path.is_symlink() and not path.exists():
        return _ANNEX_HINT if "annex" in str(path.readlink()) else "link to a file that doesn't exist"
    size = path.stat().st_size
    if size == 0:
        return "empty file"
    if size < 1000 and path.read_bytes().startswith(b"/annex/objects/"):
        return _ANNEX_HINT
    if path.name.lower().endswith(".nii") and path.with_name(path.name + ".gz").exists():
        return "the same image is there compressed"
    return None

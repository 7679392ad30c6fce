"""The weights of a package: where they lie in a container, and whether they are those that were packaged."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import BinaryIO

from nnunet_ssl.errors import UserError

DIGESTS = "weights.json"
FOLDER = "model"
MOUNT = Path("/opt/ml/model")
"""Where Grand Challenge unpacks separately uploaded weights. It mounts that folder even if there are none, and hides
what an image has there: a package keeps its own elsewhere."""

logger = logging.getLogger(__name__)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def write_digests(package: Path) -> None:
    """Write down the digests of all files of a package's weights."""
    folder = package / FOLDER
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {str(path.relative_to(folder)): digest(path) for path in files}
    (package / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")


def find_weights(package: Path, mount: Path = MOUNT) -> Path:
    """Return the folder with a package's weights, once they are known to be whole: the mounted one, else its own.

    Raises:
        UserError: no folder has them, or a file is not what was packaged.
    """
    digests = json.loads((package / DIGESTS).read_text())
    places = (mount, package / FOLDER)
    for folder in places:
        missing = [name for name in digests if not (folder / name).is_file()]
        if not missing:
            _check(folder, digests)
            return folder
        logger.info("%s lacks %d of %d files of the weights", folder, len(missing), len(digests))
    raise UserError(
        f"The weights lie neither in {places[0]} nor in {places[1]}: build the image with the package's folder "
        f"{FOLDER}, or upload an archive of what that folder holds."
    )


def _check(folder: Path, digests: dict[str, str]) -> None:
    wrong = [name for name, expected in digests.items() if digest(folder / name) != expected]
    if wrong:
        raise UserError(f"{folder / wrong[0]} is not the file that was packaged: its SHA-256 differs. Copy it again.")


def _digest(file: BinaryIO) -> str:
    """What ``hashlib.file_digest`` does, which Python has since 3.11."""
    result = hashlib.sha256()
    for block in iter(lambda: file.read(2**20), b""):
        result.update(block)
    return result.hexdigest()

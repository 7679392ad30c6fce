"""Cases that lack channels: found in a folder, and completed by placeholder files, of which nnU-Net needs one each.

A placeholder is an image of zeros on the grid of a channel that is there. nnU-Net crops to what is not zero and
z-scores, and zeros stay zeros; a network trained with ``channels=any`` tells them from a scan by itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

from nnunet_ssl.errors import UserError, one_line
from nnunet_ssl.files import written_beside
from nnunet_ssl.nnunet_folders import channel_names


@dataclass(frozen=True)
class Channels:
    """What nnU-Net knows of a data set's images, from its dataset.json.

    Attributes:
        names: of the channels, in order.
        file_ending: of the images.
    """

    names: tuple[str, ...]
    file_ending: str
    dataset: Mapping[str, Any]

    @classmethod
    def of(cls, dataset: Mapping[str, Any]) -> Channels:
        return cls(tuple(channel_names(dataset)), dataset["file_ending"], dataset)

    def reader(self, example: Path) -> BaseReaderWriter:
        """nnU-Net's reader and writer of such images."""
        kind = determine_reader_writer_from_dataset_json(self.dataset, str(example), verbose=False)
        reader: BaseReaderWriter = kind()
        return reader


@dataclass(frozen=True)
class PartialCase:
    """A case, and for each channel its file, or None.

    Attributes:
        id: what stands before the channel's number in the names of its files.
    """

    id: str
    files: tuple[Path | None, ...]

    def missing(self, channels: Channels) -> list[str]:
        """The names of the channels that it lacks."""
        return [name for name, file in zip(channels.names, self.files, strict=True) if file is None]


def find_cases(folder: Path, channels: Channels) -> list[PartialCase]:
    """Find nnU-Net's cases in a folder, whose files may be there in part; a constant image counts as missing.

    Raises:
        UserError: there is no case, a file has the number of no channel, or numbers that are not finite, or all files
            of a case are constant.
    """
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(channels.file_ending)}")
    matches = [(path, match) for path in sorted(folder.glob("[!.]*")) if (match := pattern.fullmatch(path.name))]
    if not matches:
        raise UserError(f"{folder} holds no images of nnU-Net's names, CASE_0000{channels.file_ending}.")
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for path, match in matches:
        if int(match[2]) >= len(channels.names):
            raise UserError(
                f"{path} is channel {int(match[2])}, and the data set's are 0 to {len(channels.names) - 1} "
                f"({', '.join(channels.names)})."
            )
        found[match[1]][int(match[2])] = path
    places = range(len(channels.names))
    return [partial_case(name, [files.get(place) for place in places], channels) for name, files in found.items()]


def partial_case(name: str, files: Sequence[Path | None], channels: Channels) -> PartialCase:
    """Return a case without the files whose images are constant.

    Raises:
        UserError: no file is left, or one has numbers that are not finite, of which nnU-Net makes an empty prediction.
    """
    case = PartialCase(name, tuple(file if file and _varies(file, channels) else None for file in files))
    if not any(case.files):
        given = [str(file) for file in files if file]
        what = f"{', '.join(given)} {'are' if len(given) > 1 else 'is'} constant" if given else "it has no file"
        raise UserError(f"The case {name} has none of the channels {', '.join(channels.names)}: {what}.")
    return case


def completed(case: PartialCase, folder: Path, channels: Channels) -> list[Path]:
    """Return a file for each channel of a case; those that are missing are written into `folder`."""
    like = next(file for file in case.files if file)
    reader = channels.reader(like)
    files, absent = [], [place for place, file in enumerate(case.files) if file is None]
    image, properties = reader.read_images([str(like)]) if absent else (np.empty(0), {})
    for place, file in enumerate(case.files):
        path = file or folder / f"{case.id}_{place:04d}{channels.file_ending}"
        if file is None:
            with written_beside(path) as temporary:
                reader.write_seg(np.zeros(image.shape[1:], dtype=np.uint8), str(temporary), properties)
        files.append(path)
    return files


def _varies(file: Path, channels: Channels) -> bool:
    try:
        image, _ = channels.reader(file).read_images([str(file)])
    except Exception as error:  # each reader, and each library behind it, has its own
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    if bad := image.size - np.count_nonzero(np.isfinite(image)):
        raise UserError(f"{bad} voxels of {file} are NaN or infinite: give them numbers, such as 0 in the background.")
    return bool(np.ptp(image) > 0)

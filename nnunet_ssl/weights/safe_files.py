"""Open checkpoints that other people wrote, and never run what they may carry.

A PyTorch file is a pickle: a little program that may call any function. Here it is read by ``torch.load`` with
``weights_only=True``, which builds tensors and plain values and stops at anything else; NumPy's scalars and arrays,
which logs of trainings are full of, are allowed as well. Objects of other packages' classes, such as the modules that
Lightning keeps among its hyper-parameters, become placeholders that hold and do nothing: nothing of those packages is
imported or called. What would call Python's own library is refused. A safetensors file has no program in it.
"""

from __future__ import annotations

import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from nnunet_ssl.errors import UserError

LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
DATA_MODULES = ("argparse", "collections", "datetime", "decimal", "enum", "functools", "pathlib", "types", "uuid")
"""Of Python's own library: what files hold as data, and may have placeholders."""

PYTHONS_OWN = {*sys.stdlib_module_names, *IMPORT_MAPPING, "__main__"}
"""Python's own library, also by the names of Python 2, which pickles still use, and the running program."""

STORE_ALONE = (
    "If you trust whoever made it, store the weights alone, where it can be read: "
    "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW), or torch.save(network.state_dict(), NEW)"
)
ZIP, PICKLE, LFS_POINTER = b"PK\x03\x04", b"\x80", b"version https://git-lfs"


class Placeholder:
    """Stands for an object of a class unknown here; takes whatever the file would have told it, and keeps nothing."""

    path = ""

    def __new__(cls, *_: Any, **__: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.path}>"


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """What lies in a file: plain containers, tensors on the CPU, and a safetensors file's header."""

    path: Path
    content: Mapping[str, Any]
    header: Mapping[str, str] = field(default_factory=dict)


def read_file(path: Path | str) -> CheckpointFile:
    """Read a safetensors file or what ``torch.save`` wrote; which of them it is, its first bytes say.

    Raises:
        UserError: there is no such file, it is damaged, no checkpoint, or needs code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}.")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(LFS_POINTER):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself. Fetch it: git lfs pull")
    if _begins_a_safetensors_file(start):  # first: its length may begin with the bytes of another format
        return _read_safetensors(path)
    if start.startswith(ZIP):
        _check_archive(path)
    if start.startswith((ZIP, PICKLE)):
        content = _unpickle(path)
        if not isinstance(content, Mapping):
            what = content.path if isinstance(content, Placeholder) else type(content).__name__
            raise UserError(f"{path} holds a {what}, where a checkpoint has a dict. {STORE_ALONE}")
        return CheckpointFile(path=path, content=content)
    raise UserError(f"{path} is neither a PyTorch file nor a safetensors file.")


def _begins_a_safetensors_file(start: bytes) -> bool:
    """Tell it by its first bytes: the length of its header, little-endian, and the brace that opens the header."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER


def _read_safetensors(path: Path) -> CheckpointFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return CheckpointFile(path=path, content=content, header=file.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}). Copy or download it again.") from error


def _check_archive(path: Path) -> None:
    """Compare checksums, which ``torch.load`` does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, names = archive.testzip(), archive.namelist()
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is not a complete PyTorch file ({error}). Copy or download it again.") from error
    if damaged is not None:
        raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong. Copy or download it again.")

    inside = [name for name in names if name.endswith((".pt", ".pth", ".ckpt", ".safetensors"))]
    if inside and not any(name.endswith("data.pkl") for name in names):
        raise UserError(f"{path} is an archive of files: unpack it, and take {', '.join(inside[:4])}.")


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([*_harmless_globals(), *_placeholders(path)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is not None:
            raise UserError(
                f"{path} is refused: it holds more than tensors and plain values, and reading it would run "
                f"{wanted[1].removesuffix('`')}, which may be any program. {STORE_ALONE}"
            ) from error
        if "Can only" in str(error) or "reduce" in str(error):
            raise UserError(
                f"{path} is refused: it holds objects that only their own code can read. {STORE_ALONE}"
            ) from error
        raise UserError(f"{path} is damaged or no PyTorch file. Copy or download it again.") from error
    except (RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a PyTorch file ({reason}). Copy or download it again.") from error


def _placeholders(path: Path) -> list[tuple[type, str]]:
    """Return a placeholder for every class or function that a file names and that is neither harmless nor Python's own.

    Only of archives, which PyTorch writes since 1.6: of older files it cannot list the names before it reads them.
    """
    if not zipfile.is_zipfile(path):
        return []
    with torch.serialization.safe_globals(_harmless_globals()):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(type("Placeholder", (Placeholder,), {"path": name}), name) for name in names if _is_foreign(name)]


def _is_foreign(name: str) -> bool:
    package = name.partition(".")[0]
    return package in DATA_MODULES or package not in PYTHONS_OWN


def _harmless_globals() -> list[Any]:
    """NumPy's dtypes, scalars and arrays of numbers, under the names that NumPy 1 and 2 pickle them by."""
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    functions = [
        (function, f"{package}.multiarray.{name}")
        for package in ("numpy.core", "numpy._core")
        for function, name in ((scalar, "scalar"), (reconstruct, "_reconstruct"))
    ]
    numbers = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"
    return [*functions, np.dtype, np.ndarray, *{type(np.dtype(code)) for code in numbers}]

"""Does the environment keep what pyproject.toml promises? Asked before anything is imported that would mind."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from nnunet_ssl.errors import UserError

FAULTS = {
    "torch==2.9.*": "3-D convolutions in mixed precision are several times slower and larger on a GPU",
}
"""Why releases are left out of pyproject.toml's ranges (PyTorch's issues #166122 and #166643)."""


def check_requirements(package: str = "nnunet_ssl") -> None:
    """Compare the installed releases with the ranges in the installed package's own metadata.

    A build between releases counts as the release it leads to (NVIDIA's containers hold such a PyTorch, 2.6.0a0+...).
    What is not installed as a package, as in a checkout on PYTHONPATH, can't be compared and is left alone.

    Raises:
        UserError: A release lies outside its range.
    """
    found, wanted = [], []
    for requirement in _requirements(package):
        release = _release(requirement.name)
        if release and not requirement.specifier.contains(release.base_version):
            found.append(f"{requirement.name} {release}{_reason(requirement.name, release)}")
            wanted.append(f"{requirement.name}{requirement.specifier}")
    if wanted:
        remedy = shlex.join([sys.executable, "-m", "pip", "install", *wanted])
        raise UserError(f"{package} needs {' and '.join(wanted)}, not {' and '.join(found)}; run: {remedy}")


def _requirements(package: str) -> list[Requirement]:
    """What the package needs here and without its extras."""
    try:
        requirements = [Requirement(line) for line in requires(package) or ()]
    except PackageNotFoundError:
        return []
    return [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]


def _release(name: str) -> Version | None:
    try:
        return Version(version(name))
    except (PackageNotFoundError, InvalidVersion):
        return None


def _reason(name: str, release: Version) -> str:
    for fault in map(Requirement, FAULTS):
        if fault.name == name and fault.specifier.contains(release.base_version):
            return f" ({FAULTS[str(fault)]})"
    return ""

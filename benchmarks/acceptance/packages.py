"""Which required packages are missing here, and the wheels in a folder that supply them.

Only packages that are missing, or older than pyproject.toml allows, come from the folder, and never torch and
torchvision: the machine's own fit its driver.
"""

import os
import subprocess
import sys
import tomllib
import zipfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from acceptance.jobs import REPOSITORY

OF_THE_MACHINE = ("torch", "torchvision")
STAND_INS = {"pillow": "pillow-simd"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """The wheels to install, the requirements that they satisfy, and the requirements that no wheel satisfies."""

    wheels: tuple[Path, ...]
    brought: tuple[Requirement, ...]
    missing: tuple[Requirement, ...]


def find_needs(requirements: Sequence[Requirement], wheels: Sequence[Path]) -> Needs:
    """What must be installed for these requirements and for those of the chosen wheels.

    The requirements of installed packages are assumed to be satisfied.
    """
    queue, known = deque(requirements), set()
    chosen: dict[Path, Requirement] = {}
    missing: list[Requirement] = []
    while queue:
        requirement = queue.popleft()
        name = canonicalize_name(requirement.name)
        if name in known or is_installed(requirement):
            continue
        known.add(name)
        wheel = None if name in OF_THE_MACHINE else newest_wheel(requirement, wheels)
        if wheel is None:
            missing.append(requirement)
        else:
            chosen[wheel] = requirement
            queue.extend(requirements_of(wheel))
    return Needs(wheels=tuple(chosen), brought=tuple(chosen.values()), missing=tuple(missing))


def required_packages() -> list[Requirement]:
    """The dependencies in pyproject.toml, with their lower bounds."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def is_installed(requirement: Requirement) -> bool:
    """Whether a suitable version is installed."""
    for name in (requirement.name, STAND_INS.get(canonicalize_name(requirement.name))):
        try:
            if name and requirement.specifier.contains(metadata.version(name), prereleases=True):
                return True
        except metadata.PackageNotFoundError:
            continue
    return False


def newest_wheel(requirement: Requirement, wheels: Sequence[Path]) -> Path | None:
    """The newest of these wheels that satisfies the requirement and runs on this Python and machine."""
    tags, found = set(sys_tags()), []
    for path in wheels:
        try:
            name, version, _, wheel_tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            continue
        if name == canonicalize_name(requirement.name) and wheel_tags & tags and version in requirement.specifier:
            found.append((version, path))
    return max(found)[1] if found else None


def requirements_of(wheel: Path) -> list[Requirement]:
    """A wheel's requirements on this Python and machine, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        header = HeaderParser().parsestr(archive.read(name).decode())
    requirements = map(Requirement, header.get_all("Requires-Dist") or [])
    return [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]


def install(wheels: Sequence[Path], folder: Path) -> None:
    """Unpack wheels into a folder. Raises subprocess.CalledProcessError."""
    flags = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(folder)]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, *map(str, wheels)], env=environment, check=True)

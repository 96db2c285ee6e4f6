"""Which versions a figure was computed with."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """Python's version and those of the distributions in `libraries`."""
    found = {"python": platform.python_version()}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found

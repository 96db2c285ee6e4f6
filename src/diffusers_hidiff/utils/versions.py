"""Which versions a figure was computed with."""

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """Python's version and those of the distributions in `libraries`."""
    found = {"python": platform.python_version()}
    for library in libraries:
        try:
            # What is imported knows its build, as in 2.13.0+cu130; the metadata of some builds of torch do not tell it.
            found[library] = str(getattr(sys.modules.get(library), "__version__", None) or version(library))
        except PackageNotFoundError:
            found[library] = "not installed"
    return found

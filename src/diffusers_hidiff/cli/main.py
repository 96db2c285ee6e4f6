"""`hidiff COMMAND …`, also `python -m diffusers_hidiff COMMAND …`."""

import argparse
import sys

from .. import __version__
from . import CommandError, analyse, compare_schedulers, deblur, evaluate, info, score

COMMANDS = (deblur, evaluate, score, compare_schedulers, analyse, info)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hidiff", description="Removes motion blur from photographs (HI-Diff).")
    parser.add_argument("--version", action="version", version=f"hidiff {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Those of the command line unless given.
    Returns:
        The exit status: 0 all done, 1 some images failed, 2 nothing could begin, 130 interrupted.
    """
    options = make_parser().parse_args(arguments)
    try:
        return options.run(options)
    except CommandError as error:
        print(f"hidiff: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

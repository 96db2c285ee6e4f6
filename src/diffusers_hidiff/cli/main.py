"""`hidiff COMMAND …`, also `python -m diffusers_hidiff COMMAND …`."""

import argparse
import os
import sys
from importlib import import_module

from .. import __version__
from . import CommandError

# Name -> what it does. The file of that name adds the arguments when the command is asked for.
COMMANDS = {
    "deblur": "restore image files",
    "evaluate": "score a model on a benchmark",
    "score": "score restored images",
    "compare-schedulers": "compare schedulers, numbers of steps and seeds on a data set",
    "analyse": "look into the model at work on one image",
    "info": "tell what a model is made of",
}


def make_parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser of the program.

    Args:
        wanted: The command whose arguments will be parsed; the others are only named, so that their libraries need not be
            imported.
    """
    parser = argparse.ArgumentParser(prog="hidiff", description="Removes motion blur from photographs (HI-Diff).")
    parser.add_argument("--version", action="version", version=f"hidiff {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        if name == wanted:
            import_module(f".{name.replace('-', '_')}", __package__).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=purpose)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Those of the command line unless given.
    Returns:
        The exit status: 0 all done, 1 some images failed, 2 nothing could begin, 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
        options = make_parser(wanted).parse_args(arguments)
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `hidiff info | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
        return 1
    except CommandError as error:
        print(f"hidiff: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

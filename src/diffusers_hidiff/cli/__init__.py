"""The command line, `hidiff`: one command, one file, imported when it is asked for. Here is what all of them share.

`hidiff --help` imports neither torch nor diffusers: what needs them is in `pipeline`.
"""

import argparse
from collections.abc import Callable

DEVICES = ("cuda", "mps", "cpu")  # in the order in which "auto" takes them


class CommandError(Exception):
    """What was asked for cannot work; the message is one sentence for the user."""


def first_line(error: BaseException) -> str:
    """What an error says first; libraries go on for pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def at_least(minimum: int) -> Callable[[str], int]:
    """For argparse: a whole number of at least `minimum`."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
        return int(text)

    return whole_number

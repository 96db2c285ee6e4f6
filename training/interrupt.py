"""Ctrl-C and SIGTERM as a wish to leave soon."""

import signal
import threading
import types
from typing import Any


class Interrupt:
    """Within `with`, the first Ctrl-C or SIGTERM is noted in `asked`, so that the step in progress can end.

    A second one stops at once. A signal that is ignored, as by nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def note(self, number: int, frame: types.FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self.before[number])

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self.before = {n: handler for n, handler in handlers.items() if handler is not signal.SIG_IGN}
        for number in self.before:
            signal.signal(number, self.note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

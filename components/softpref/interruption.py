"""What SIGINT and SIGTERM do to a command: what it runs is ended first, then it says so and ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

GRACE = 20.0  # seconds for interrupted tasks to end their tracking runs


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came.

    Attributes:
        status: the exit status that shells expect then.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextlib.contextmanager
def interruptible(end: Callable[[float], None] | None = None) -> Iterator[None]:
    """Within it SIGINT and SIGTERM raise `Interrupted`. Has no effect outside the main thread.

    Args:
        end: called in a thread of its own to stop what else runs, with the seconds that it may still have: 0
            at a second signal, which then raises nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        again, interrupted = interrupted, True
        if end:
            threading.Thread(target=end, args=(0.0 if again else GRACE,), daemon=True).start()
        if not (again and end):
            raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

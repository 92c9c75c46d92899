"""What a person sees: messages, phases and progress on standard error; standard output is for results."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar

LOUD_AFTER = 2.0  # seconds after which a phase says that it is going on
WARNING = "warning: "  # how a line begins that `quieted` lets through
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextlib.contextmanager
def quieted(quiet: bool) -> Iterator[None]:
    """Within the block, nothing but warnings is said and no progress shown, if ``quiet``."""
    token = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


def say(text: str) -> None:
    """A line on standard error, above a progress bar if there is one."""
    from tqdm import tqdm

    if _quiet.get() and not text.startswith(WARNING):
        return

    with tqdm.external_write_mode(file=sys.stderr):
        print(f"sega-jax: {text}", file=sys.stderr, flush=True)


class _Handler(logging.Handler):
    """Log records as lines, each text once."""

    def __init__(self):
        super().__init__(logging.INFO)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._seen:
            self._seen.add(text)
            say(f"{WARNING}{text}" if record.levelno >= logging.WARNING else text)


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Shows what the package logs, from INFO up, for the duration of the block."""
    logger, handler = logging.getLogger("sega_jax"), _Handler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class Phase:
    """Something that may take long: says so once it has taken `LOUD_AFTER` seconds, and how long it took."""

    def __init__(self, text: str):
        self._text = text
        self._quiet = _quiet.get()  # timers have a context of their own
        self._begun = time.perf_counter()
        self._loud = False
        self._timer = threading.Timer(LOUD_AFTER, self._announce)
        self._timer.daemon = True
        self._timer.start()

    def _announce(self) -> None:
        self._loud = not self._quiet
        if self._loud:
            say(f"{self._text} …")

    def end(self) -> None:
        """The phase is over; more than one call does no harm."""
        self._timer.cancel()
        if self._loud:
            self._loud = False
            say(f"{self._text}: done after {time.perf_counter() - self._begun:.0f} s")

    def __enter__(self) -> Phase:
        return self

    def __exit__(self, kind: object, *_exc: object) -> None:
        if kind is not None:
            self._loud = False
        self.end()


def progress_bar(total: int, label: str, done: int = 0):
    """A bar over the steps of a batch, with the time left; ``done`` steps do not count for the speed."""
    from tqdm import tqdm

    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        unit="step",
        file=sys.stderr,
        disable=_quiet.get(),
        leave=True,
        mininterval=0.1 if interactive else 10.0,
        dynamic_ncols=interactive,
    )

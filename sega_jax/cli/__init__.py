"""The command line: ``sega-jax generate | decode | convert | inspect | plan | methods | models | bench | doctor``.

Each verb is a frozen dataclass of its options with ``run()``, which is also the Python API::

    from sega_jax.cli import Generate
    Generate(prompt="a red circle", size="512").run()
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence

_VERBS = {
    "generate": "Generate",
    "decode": "Decode",
    "convert": "Convert",
    "inspect": "Inspect",
    "plan": "Plan",
    "methods": "Methods",
    "models": "Models",
    "bench": "Bench",
    "doctor": "Doctor",
}

__all__ = ["Bench", "Convert", "Decode", "Doctor", "Generate", "Inspect", "Methods", "Models", "Plan", "main"]


def __getattr__(name: str):
    for verb, cls in _VERBS.items():
        if name == cls:
            return getattr(importlib.import_module(f"sega_jax.cli.{verb}"), cls)
    raise AttributeError(f"module 'sega_jax.cli' has no attribute {name!r}")


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that files are left in order."""


def _one_line(text: str, longest: int = 4) -> str:
    """A message as one line; of a list of problems, the first few."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > longest + 1:
        lines = [*lines[: longest + 1], f"… ({len(lines) - longest - 1} more; SEGA_JAX_DEBUG=1 shows all)"]
    return " ".join(lines[:1]) + "".join(f"; {line}" for line in lines[1:]).replace(":;", ":", 1)


def _error(text: str) -> None:
    print(f"sega-jax: error: {text}", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]):
    """The verb with its options.

    Raises:
        ValueError: with the parser's complaint.
        SystemExit: after printing help.
    """
    from typing import Annotated, Union

    import tyro

    import sega_jax

    if list(argv) == ["--version"]:
        print(sega_jax.__version__)
        raise SystemExit(0)
    from sega_jax.cli.grouping import Grouped, grouped
    from sega_jax.cli.spelling import understood

    known = {verb: getattr(importlib.import_module(f"sega_jax.cli.{verb}"), cls) for verb, cls in _VERBS.items()}
    argv = [argv[0], *understood(argv[1:])] if argv and argv[0] == "generate" else list(argv)
    if argv and argv[0] == "generate":  # the one verb with so many options that they need groups
        known["generate"] = grouped(known["generate"], importlib.import_module("sega_jax.cli.generate").GROUPS)
    verbs = Union[tuple(Annotated[cls, tyro.conf.subcommand(verb)] for verb, cls in known.items())]  # noqa: UP007
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(
                verbs,
                args=list(argv),
                prog="sega-jax",
                description="Text to image far beyond the trained size.  `sega-jax VERB --help` lists its options.",
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
            return parsed.flat() if isinstance(parsed, Grouped) else parsed
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        verb = next((word for word in argv if word in known), "")
        raise ValueError(_complaint(complaint.getvalue(), f"sega-jax {verb}".strip())) from None


def _complaint(box: str, command: str) -> str:
    """The parser's complaint without its frame, its title and its repetition of the help."""
    blocks: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│|╭╮╰╯+ \n")
        if text and not text.strip("─- "):
            blocks.append([])
        elif text and not line.startswith(("╭", "╰")):
            blocks[-1].append(text)
    told = blocks[0] if "╭" in box else [*blocks, []][1]  # without a frame, the title is a block of its own
    return f"{' '.join(told) or 'the arguments cannot be read'} (see {command} --help)"


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise within the block, where the main thread runs it: the first of them only.

    What a second one would interrupt is the tidying up after the first.
    """
    met: list[int] = []

    def stop(number, _frame):
        met.append(number)
        if len(met) == 1:
            raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if len(met) > _PATIENCE:  # tidying up does not end
            os._exit(128 + number)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # a shell that runs this behind itself ignores Ctrl-C
                before[number] = signal.signal(number, stop) or signal.SIG_DFL
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


_PATIENCE = 3  # signals until a run that was told to stop is ended at once


def _leave(code: int) -> int:
    """Ends a program that was interrupted, without waiting for threads that still compile."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: arguments after the program's name; default those of the process.

    Returns:
        The exit code: 0; 1 for unusable checkpoints and files, and for a ``doctor`` or ``inspect`` that finds
        something broken; 2 for arguments; 130 and 143 when interrupted.
    """
    code = _main(sys.argv[1:] if argv is None else argv)
    return _leave(code) if argv is None and code in (130, 143) else code


def _main(argv: Sequence[str]) -> int:
    from converters.errors import CheckpointError
    from sega_jax.cli.console import logging_to_stderr

    try:
        with _stopping(), logging_to_stderr():
            verb = _parse(argv)
            result = verb.run()
        if getattr(verb, "json", False):
            print(json.dumps(result, ensure_ascii=False))
        else:
            print(verb.show(result))
        sys.stdout.flush()
        return 0 if result.get("ok", True) else 1
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except KeyboardInterrupt:
        _error("interrupted")
        return 130
    except _Terminated:
        _error("terminated")
        return 143
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("SEGA_JAX_DEBUG") == "1":
            traceback.print_exc()
        text = _one_line(_message(error))
        if isinstance(error, (CheckpointError, OSError)):
            _error(text)
            return 1
        if isinstance(error, (ValueError, TypeError)):
            _error(text)
            return 2
        _error(f"{type(error).__name__}: {text} (SEGA_JAX_DEBUG=1 shows where)")
        return 1


def _message(error: Exception) -> str:
    """What an exception says; the system's errors name their file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)

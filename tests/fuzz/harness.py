"""A fuzzer for everything that opens a file or parses a string: only documented errors, little time, little memory.

An `Entry` makes an input from a seeded generator and hands it to the code under test.  `check` runs inputs of an entry
in a process of its own, with its memory limited, so that a crash or a runaway ends that process and names the input.
To see one input again (the folder it was made in is kept and printed):

    python -m tests.fuzz.harness tests.fuzz.converters:LORA --only 1234
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

REPOSITORY = Path(__file__).parents[2]
SECONDS = 5.0  # of processor time for one input: what a waiting or busy machine adds is not the input's
STUCK = 30.0  # seconds on the clock: an input that waits for something that never comes
MEMORY = 10**9  # bytes above what the process held before the input
_STARTING = 120  # seconds that imports and the making of seeds may take


@dataclass(frozen=True)
class Entry:
    """Something that is given inputs.

    Attributes:
        make: writes an input into an empty folder, and returns what `run` takes (a path, text, bytes).
        run: the code under test.
        errors: what it may raise, as documented.
        setup: called once in the process before the first input (imports, seeds that are slow to make).
    """

    make: Callable[[Random, Path], Any]
    run: Callable[[Any], object]
    errors: tuple[type[BaseException], ...]
    setup: Callable[[], object] = lambda: None


class TooSlow(BaseException):
    """An input took longer than it may; not an Exception, so that nothing takes it for one of its own."""


def _stop(*_arguments: object) -> None:
    raise TooSlow


def _peak(reset: bool) -> int:
    """Largest resident bytes of this process since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _limit_memory() -> None:
    """No more private memory than `MEMORY` and a half above what is held; mapped files do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    held = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY * 3 // 2, resource.RLIM_INFINITY))


def run_one(entry: Entry, name: str, number: int, folder: Path) -> tuple[str, str | None]:
    """Input ``number`` of an entry: how it ended (``ok`` or the error's class), and what is wrong with that, if so."""
    made = entry.make(Random(f"{name}/{number}"), folder)
    before = _peak(reset=True)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, STUCK)
    started, wrong = time.process_time(), None
    try:
        entry.run(made)
        ended = "ok"
    except entry.errors as exc:
        ended = type(exc).__name__
        if not str(exc).strip():
            wrong = f"{ended} without a message"
    except TooSlow:
        ended, wrong = "TooSlow", f"more than {SECONDS} s, or stuck:\n{traceback.format_exc()}"
    except BaseException as exc:  # also those of libraries that are no Exception
        ended, wrong = type(exc).__name__, f"undocumented {type(exc).__name__}:\n{traceback.format_exc()}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    took, grown = time.process_time() - started, _peak(reset=False) - before
    if wrong is None and took > SECONDS:
        wrong = f"{took:.1f} s"
    if wrong is None and grown > MEMORY:
        wrong = f"{grown / 1e9:.2f} GB"
    return ended, wrong


def _load(spec: str) -> Entry:
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)


def _run(spec: str, first: int, count: int, home: Path) -> dict[str, Any]:
    """Inputs ``first`` to ``first + count`` in this process; stops at the first that is wrong."""
    entry = _load(spec)
    warnings.simplefilter("ignore")
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, _stop)
    entry.setup()
    _limit_memory()
    ended: Counter[str] = Counter()
    for number in range(first, first + count):
        folder = home / "input"
        folder.mkdir()
        (home / "number").write_text(str(number))
        how, wrong = run_one(entry, spec, number, folder)
        ended[how] += 1
        if wrong is not None:
            return {"ended": ended, "number": number, "wrong": wrong}
        shutil.rmtree(folder)
    return {"ended": ended}


def check(spec: str, count: int, home: Path, first: int = 0) -> Counter[str]:
    """Runs inputs of an entry in another process and fails the test at the first wrong one.

    Args:
        spec: ``module:NAME`` of an `Entry`.
        count: number of inputs.
        home: empty folder to work in.
        first: number of the first input.

    Returns:
        How often each ending came: ``ok`` and classes of errors.
    """
    arguments = [spec, "--first", str(first), "--count", str(count), "--home", str(home)]
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.harness", *arguments],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=_STARTING + STUCK + SECONDS * count,
    )  # fmt: skip
    again = f"python -m tests.fuzz.harness {spec} --only"
    if done.returncode:
        number = (home / "number").read_text() if (home / "number").is_file() else "0"
        raise AssertionError(f"the process died with {done.returncode}; {again} {number}\n{done.stderr[-4000:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    if "wrong" in report:
        raise AssertionError(f"{again} {report['number']}\n{report['wrong']}")
    return Counter(report["ended"])


def main() -> None:
    """Runs inputs as `check` asks for them, or one by hand."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.harness")
    parser.add_argument("entry", help="module:NAME")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--only", type=int, help="one input; its folder is kept")
    parser.add_argument("--home", type=Path)
    options = parser.parse_args()
    first, count = (options.first, options.count) if options.only is None else (options.only, 1)
    home = options.home or Path(tempfile.mkdtemp())
    report = _run(options.entry, first, count, home)
    if options.only is not None:
        print(f"input made in {home / 'input'}\n{report.get('wrong', '')}", file=sys.stderr)
    elif options.home is None:
        shutil.rmtree(home)
    print(json.dumps(report))


if __name__ == "__main__":
    main()

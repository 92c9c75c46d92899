"""Entries that misbehave on one input, to test the harness with."""

import contextlib
import ctypes

import numpy as np

from tests.fuzz.harness import Entry

BAD = 3  # the number of the input they misbehave on


def _entry(misbehave):
    def make(rng, folder):
        (folder / "made").write_text("")
        counter["next"] += 1
        return counter["next"] - 1

    def run(number):
        if number == BAD:
            misbehave()
        elif number % 2:
            raise ValueError("documented")

    counter = {"next": 0}
    return Entry(make, run, (ValueError,))


def _loop():
    while True:
        with contextlib.suppress(Exception):  # as code under test might
            sum(range(1000))


def _allocate():
    held = [np.ones(1_100_000_000, np.uint8)]
    del held


def _undocumented():
    raise KeyError("undocumented")


def _interrupt():
    raise type("Panic", (BaseException,), {})("from a library")


def _silent():
    raise ValueError


def _crash():
    ctypes.string_at(0)


SOUND = _entry(lambda: None)
SLOW, LARGE = _entry(_loop), _entry(_allocate)
UNDOCUMENTED, PANIC, SILENT, CRASH = _entry(_undocumented), _entry(_interrupt), _entry(_silent), _entry(_crash)

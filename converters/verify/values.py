"""Proof that a conversion lost nothing: slot by slot, the output read back against the source.

A slot is one parameter of one layer, whatever tensor of whatever layout it is a part of.  Both checkpoints are
mapped onto slots, so comparing slots compares the source with the output after the inverse mapping.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from converters.components import Checkpoint, Part, open_checkpoint
from converters.errors import CheckpointError, naming
from converters.keymap import Slot
from converters.kinds import slot_name
from converters.reading.quantised import BY_STORAGE, Format
from converters.reading.sources import is_float, kept_type, scale_of
from converters.stream import Progress, all_finite, blocks, contiguous, default_workers, in_parallel
from converters.verify.digest import Digest

_BLOCK = 1 << 19  # bytes compared at a time: small enough to stay in the cache while they are hashed
# Largest relative error of rounding to nearest, and half the smallest step near zero.
_ROUNDING = {"bfloat16": (2.0**-8, 2.0**-134), "float16": (2.0**-11, 2.0**-25), "float32": (2.0**-24, 2.0**-150)}


@dataclass
class Findings:
    """What `compare` found for one component.

    Attributes:
        slots: number of parameters compared.
        equal: how many are equal bit for bit.
        rounded: how many are the source rounded to the output's type.
        largest_error: largest relative error among those.
        bound: the bound on it, for the type.
        quantised: how many are the source within the bound of a format of eight bits with scales.
        largest_step: largest error among those, in scales.
        wrong: slots that are neither, with the reason.
        nonfinite: slots that hold NaN or infinity in the source.
        hashes: slot -> `converters.verify.digest.Digest` of type, shape and values of the source.
    """

    slots: int = 0
    equal: int = 0
    rounded: int = 0
    largest_error: float = 0.0
    bound: float = 0.0
    quantised: int = 0
    largest_step: float = 0.0
    wrong: dict[str, str] = field(default_factory=dict)
    nonfinite: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)


def stored_order(slot: Slot, array: np.ndarray) -> np.ndarray:
    """A parameter in the axis order of published checkpoints, in which it is mostly contiguous on disk."""
    if slot.path.endswith("kernel"):
        if array.ndim == 2:
            return array.T
        if array.ndim == 4:
            return array.transpose(3, 2, 0, 1)
    return array


def _digest(array: np.ndarray) -> Digest:
    return Digest(f"{array.dtype.name} {array.shape}")


def _hash(array: np.ndarray) -> str:
    digest = _digest(array)
    for block in blocks(array):
        digest.update(block)
    return digest.hexdigest()


def _same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two contiguous arrays of one type hold the same bytes; by eights, which is fastest."""
    x, y = x.view(np.uint8), y.view(np.uint8)
    even = x.size & ~7
    return np.array_equal(x[:even].view(np.uint64), y[:even].view(np.uint64)) and np.array_equal(x[even:], y[even:])


def _rounding_error(source: np.ndarray, output: np.ndarray) -> tuple[float, bool]:
    """Largest relative error of a block, and whether every value lies within the rounding bound of its type."""
    relative, tiny = _ROUNDING[output.dtype.name]
    exact, got = source.astype(np.float64), output.astype(np.float64)
    known = np.isfinite(exact)
    if not np.array_equal(known, np.isfinite(got)):
        return float("inf"), False
    exact, got = exact[known], got[known]
    error, size = np.abs(exact - got), np.abs(exact)
    within = bool(np.all(error <= np.maximum(relative * size, tiny)))
    normal = size > tiny / relative
    return (float(np.max(error[normal] / size[normal])) if normal.any() else 0.0), within


def _quantisation_error(source: np.ndarray, output: np.ndarray, scale: np.ndarray, form: Format) -> tuple[float, bool]:
    """Largest error of a block in scales, and whether every value lies within the bound of its format."""
    exact, step = source.astype(np.float64), scale.astype(np.float64)
    error = np.abs(exact - output.astype(np.float64))
    size = np.abs(exact)
    slack = 2.0**-22 * size  # the quotient and the product are float32
    within = bool(np.all(error <= np.maximum(form.relative * size, form.absolute * step) + slack))
    return float(np.max(error / step, initial=0)), within


def _compare(
    a: np.ndarray,
    b: np.ndarray,
    name: str,
    findings: Findings,
    lock: threading.Lock,
    progress: Progress,
    stored: tuple[Format, np.ndarray] | None = None,
) -> None:
    digest, finite, equal, largest, within = _digest(a), True, True, 0.0, True
    same_type = a.dtype == b.dtype
    if a.shape != b.shape:
        with lock:
            findings.wrong[name] = f"shape {b.shape} in the output, {a.shape} in the source"
        return
    # Equal memory layouts give equal blocks; the block size in values is taken from the source.
    flat = a.flags.c_contiguous and b.flags.c_contiguous and stored is None
    a, b = (a.reshape(-1), b.reshape(-1)) if flat else (np.atleast_1d(a), np.atleast_1d(b))
    if a.size:
        rows = max(1, _BLOCK // (a.nbytes // a.shape[0]))
        for start in range(0, a.shape[0], rows):
            x = contiguous(a[start : start + rows]).reshape(-1)
            y = contiguous(b[start : start + rows]).reshape(-1)
            digest.update(x)
            finite &= all_finite(x)
            if stored is not None:
                scale = np.ascontiguousarray(stored[1][start : start + rows]).reshape(-1)
                error, fits = _quantisation_error(x, y, scale, stored[0])
                largest, within = max(largest, error), within and fits
            elif same_type:
                equal &= _same_bits(x, y)
            elif is_float(b.dtype) and b.dtype.name in _ROUNDING:
                error, fits = _rounding_error(x, y)
                largest, within = max(largest, error), within and fits
            else:
                within = False
            progress.add(x.nbytes)
    with lock:
        findings.slots += 1
        findings.hashes[name] = digest.hexdigest()
        if not finite:
            findings.nonfinite.append(name)
        if stored is not None:
            findings.quantised += within
            findings.largest_step = max(findings.largest_step, largest)
            if not within:
                findings.wrong[name] = f"not the source rounded to {stored[0].name}"
        elif same_type and equal:
            findings.equal += 1
        elif not same_type and within:
            findings.rounded += 1
            findings.largest_error = max(findings.largest_error, largest)
            findings.bound = max(findings.bound, _ROUNDING[b.dtype.name][0])
        else:
            what = "values differ" if same_type else f"{b.dtype.name} is not {a.dtype.name} rounded to nearest"
            findings.wrong[name] = what


def compare(source: Part, output: Part, workers: int, progress: Progress, dtype: np.dtype | None = None) -> Findings:
    """Every parameter of the source against the output, both read from their files.

    Args:
        source, output: the component on both sides.
        workers: threads.
        progress: told of the bytes compared.
        dtype: the type that was asked for; without one every parameter must have kept its own, so that a rounding
            nobody asked for is found.
    """
    findings, lock = Findings(), threading.Lock()
    theirs, ours = source.slots(), output.slots()
    for slot in theirs.keys() ^ ours.keys():
        findings.wrong[slot_name(slot)] = "only in the " + ("source" if slot in theirs else "output")

    def task(slot: Slot):
        def run() -> None:
            tensor, piece = ours[slot]
            known, stored = scale_of(output.source, tensor.source), None
            own = kept_type(source.source, theirs[slot][0].source)
            expected = dtype if dtype is not None and is_float(own) else own
            written = output.source.storage(tensor.source)
            if known is None and written != expected:
                with lock:
                    findings.wrong[slot_name(slot)] = f"written as {written.name}, expected {expected.name}"
                return
            if known is not None and known[0] in BY_STORAGE:
                stored = BY_STORAGE[known[0]], stored_order(slot, tensor.pieces(known[1])[piece])
            view, theirs_view = _view(output, tensor, piece, slot), _view(source, *theirs[slot], slot)
            _compare(theirs_view, view, slot_name(slot), findings, lock, progress, stored)

        return run

    in_parallel([task(slot) for slot in theirs if slot in ours], workers)
    findings.nonfinite.sort()
    findings.hashes = dict(sorted(findings.hashes.items()))
    return findings


def _view(part: Part, tensor, piece: int, slot: Slot) -> np.ndarray:
    return stored_order(slot, tensor.pieces(part.source.view(tensor.source))[piece])


def check(findings: Findings, where: str, *, allow_nonfinite: bool = False) -> None:
    """Raises CheckpointError unless every parameter is equal or rightly rounded, and finite."""
    if findings.wrong:
        shown = "\n  ".join(f"{name}: {what}" for name, what in list(findings.wrong.items())[:20])
        raise CheckpointError(f"{where}: {len(findings.wrong)} parameters did not survive the conversion:\n  {shown}")
    if findings.nonfinite and not allow_nonfinite:
        raise CheckpointError(
            f"{where}: {len(findings.nonfinite)} parameters of the source hold NaN or infinity "
            f"({', '.join(findings.nonfinite[:10])}); the checkpoint is damaged. "
            "Pass --allow-nonfinite to convert it all the same"
        )


def combine(hashes: Iterable[tuple[str, str]]) -> str:
    """One fingerprint from named hashes, whatever their order."""
    return hashlib.sha256("".join(f"{name} {value}\n" for name, value in sorted(hashes)).encode()).hexdigest()


def fingerprint(checkpoint: str | Path | Checkpoint, *, workers: int | None = None, progress: bool = False) -> str:
    """A hash of a checkpoint's parameters that does not depend on its layout, file names or sharding.

    Equal for a diffusers folder, a BFL file, a ComfyUI file and an Orbax folder that hold the same values in the
    same types; any changed bit changes it.
    """
    if not isinstance(checkpoint, Checkpoint):
        with naming(checkpoint), open_checkpoint(checkpoint) as opened:
            return fingerprint(opened, workers=workers, progress=progress)
    named: dict[str, str] = {}
    total = sum(part.nbytes for part in checkpoint.parts.values())
    with Progress(total, "fingerprint", progress) as bar:

        def task(component: str, part: Part, slot: Slot, tensor, piece: int):
            def run() -> None:
                view = _view(part, tensor, piece, slot)
                named[f"{component}/{slot_name(slot)}"] = _hash(view)
                bar.add(view.nbytes)

            return run

        tasks = [
            task(component, part, slot, tensor, piece)
            for component, part in checkpoint.parts.items()
            for slot, (tensor, piece) in part.slots().items()
        ]
        in_parallel(tasks, workers or default_workers())
    return combine(named.items())

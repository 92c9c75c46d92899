"""The exact decode on one device, strip after strip, with activations on the host in between.

Between two normalisations a decoder is local, so it is run one strip of rows at a time: a strip with its neighbours'
rows goes to the device, its result comes back, and with it the strip's share of the statistics that the next norm
needs (per channel, count, mean and sum of squared deviations; joined in float64).  The mid-block attention meets one
strip of queries with one strip of keys at a time and merges by log-sum-exp.  Device memory is bounded by the strip,
host memory by the two largest activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from sega_jax.attention.kernels import Request, choose
from sega_jax.attention.merge import merge
from sega_jax.decoding.rows import check_latents, convolve, decode_by_rows, halo, prepare, resnet, visible
from sega_jax.models.layers import Conv, GroupNorm
from sega_jax.models.vae import ResnetBlock, SpatialAttention, Vae

POSITIONS = 2**18  # pixels of a strip by default: 42 rows of 6144

Moments = tuple[np.ndarray, np.ndarray, np.ndarray]
Statistics = tuple[np.ndarray, np.ndarray]


# -- on the device -----------------------------------------------------------------------------------------------------


def _moments(y: jax.Array, first: jax.Array, height: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Count f32 [], mean f32 [B, C] and sum of squared deviations f32 [B, C] of the rows inside the picture."""
    seen = visible(y.shape[1], first, height)
    y = y.astype(jnp.float32)
    count = seen.sum().astype(jnp.float32) * y.shape[2]
    mean = jnp.where(seen, y, 0.0).sum((1, 2)) / count
    return count, mean, jnp.where(seen, jnp.square(y - mean[:, None, None, :]), 0.0).sum((1, 2))


@partial(jax.jit, static_argnames=("doubled",))
def _conv(conv, norm, shortcut, slab, statistics, residual, first, height, *, doubled: bool):
    """Rows from ``first`` on, of input whose picture is ``height`` high: result and its moments."""
    y = prepare(slab, norm, statistics, first - halo(conv), height)
    y = convolve(y, conv, doubled)
    if residual is not None:
        y = y + (residual if shortcut is None else shortcut(residual))
    scale = 2 if doubled else 1
    return y, *_moments(y, scale * first, scale * height)


def _tokens(block: SpatialAttention, strip: jax.Array, statistics) -> jax.Array:
    return block.norm.normalize(strip, *statistics).reshape(strip.shape[0], -1, strip.shape[-1])


@jax.jit
def _keys(block: SpatialAttention, strip, statistics):
    """Keys and values [B, R * W, C] of a strip [B, R, W, C]."""
    tokens = _tokens(block, strip, statistics)
    return block.key(tokens), block.value(tokens)


@jax.jit
def _query(block: SpatialAttention, strip, statistics):
    """Queries [B, R * W, C] of a strip, and the result of an attention over nothing."""
    query = block.query(_tokens(block, strip, statistics))
    out = jnp.zeros((*query.shape[:2], 1, query.shape[2]), jnp.float32)
    return query, (out, jnp.full(out.shape[:3], -jnp.inf, jnp.float32))


@jax.jit
def _attend(query, key, value, length, result):
    """``result`` (out, lse) after meeting the keys of one more strip; ``length`` i32 [B], or None where all count."""
    query, key, value = (x[:, :, None, :] for x in (query, key, value))
    request = Request(query, key, value, query.shape[-1] ** -0.5, length)
    kernel, _ = choose(request)
    return merge(result, kernel.run(request))


@jax.jit
def _mix(block: SpatialAttention, strip, out, first, height):
    """The block's result for a strip, and its moments."""
    y = strip + block.out(out[:, :, 0, :].astype(strip.dtype)).reshape(strip.shape)
    return y, *_moments(y, first, height)


# -- on the host -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Field:
    """An activation [B, H, W, C] on the host, and the moments of its strips."""

    array: np.ndarray
    moments: tuple[Moments, ...] = ()

    def statistics(self, norm: GroupNorm) -> Statistics:
        """Mean and 1 / standard deviation of every channel's group, f32 [B, 1, 1, C]."""
        count, mean, square = (np.stack(x).astype(np.float64) for x in zip(*self.moments, strict=True))
        share = (count / count.sum())[:, None, None]
        center = (share * mean).sum(0)
        variance = square.sum(0) / count.sum() + (share * np.square(mean - center)).sum(0)
        batch, channels = center.shape
        groups = (batch, norm.groups, channels // norm.groups)
        center, variance = center.reshape(groups), variance.reshape(groups)
        middle = center.mean(-1, keepdims=True)
        variance = (variance + np.square(center - middle)).mean(-1, keepdims=True)
        factor = 1.0 / np.sqrt(variance + norm.epsilon)
        return tuple(
            np.broadcast_to(x, groups).reshape(batch, 1, 1, channels).astype(np.float32) for x in (middle, factor)
        )


class _Strips:
    """`Rows` on the host: every strip holds about ``positions`` pixels, whatever the resolution."""

    def __init__(self, positions: int):
        self.positions = positions

    # These four are all that touches a device or large memory; `_Survey` answers them without either.

    def _call(self, name: str, function: Callable, *arguments: Any, **static: Any) -> Any:
        del name
        return function(*arguments, **static)

    def _empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        return np.empty(shape, dtype)

    def _starts(self, height: int, rows: int) -> range:
        return range(0, height, rows)

    def _write(self, array: np.ndarray, first: int, rows: np.ndarray) -> None:
        array[:, first : first + rows.shape[1]] = rows[:, : array.shape[1] - first]

    def _rows(self, height: int, width: int) -> int:
        """Rows of a strip: strips of one height as even as can be, so that little of the last one is filling."""
        most = max(1, self.positions // width)
        return -(-height // -(-height // most))

    def strips(
        self,
        x: _Field,
        conv: Conv,
        *,
        norm: GroupNorm | None = None,
        doubled: bool = False,
        residual: _Field | None = None,
        shortcut: Conv | None = None,
    ) -> Iterator[tuple[int, np.ndarray, Moments]]:
        """First row, rows and moments of the strips of `conv`'s result, one after the other.

        A strip is read from ``x`` and ``residual`` before its predecessor is handed out, so that the transfer of one
        overlaps the computation of the next, and so that results may replace either of the two.
        """
        _, height, width, _ = x.array.shape
        statistics = None if norm is None else x.statistics(norm)
        scale = 2 if doubled else 1
        rows = self._rows(height, scale * scale * width)
        pending = None
        for first in self._starts(height, rows):
            result = self._call(
                "doubling convolution" if doubled else "convolution",
                _conv,
                conv,
                norm,
                shortcut,
                _cut(x.array, first - halo(conv), first + rows + halo(conv)),
                statistics,
                None if residual is None else _cut(residual.array, first, first + rows),
                np.int32(first),
                np.int32(height),
                doubled=doubled,
            )
            if pending is not None:
                yield _fetch(*pending)
            pending = scale * first, result
        yield _fetch(*pending)

    def conv(
        self,
        x: _Field,
        conv: Conv,
        *,
        norm: GroupNorm | None = None,
        doubled: bool = False,
        residual: _Field | None = None,
        shortcut: Conv | None = None,
    ) -> _Field:
        batch, height, width, channels = x.array.shape
        scale = 2 if doubled else 1
        shape = (batch, scale * height, scale * width, conv.kernel.shape[-1])
        result = x.array if residual is not None and channels == shape[-1] else self._empty(shape, x.array.dtype)
        moments = []
        options = {"norm": norm, "doubled": doubled, "residual": residual, "shortcut": shortcut}
        for first, rows, moment in self.strips(x, conv, **options):
            self._write(result, first, rows)
            moments.append(moment)
        return _Field(result, tuple(moments))

    def resnets(self, x: _Field, blocks: Sequence[ResnetBlock]) -> _Field:
        for block in blocks:
            x = resnet(self, x, block)
        return x

    def attention(self, x: _Field, block: SpatialAttention) -> _Field:
        batch, height, width, channels = x.array.shape
        statistics = x.statistics(block.norm)
        rows = self._rows(height, width)
        starts = self._starts(height, rows)
        keys, values = (self._empty((batch, height, width, channels), x.array.dtype) for _ in range(2))
        for first in starts:
            strip = _cut(x.array, first, first + rows)
            for array, tokens in zip((keys, values), self._call("keys", _keys, block, strip, statistics), strict=True):
                self._write(array, first, np.asarray(tokens).reshape(strip.shape))
        moments = []
        for first in starts:
            strip = _cut(x.array, first, first + rows)
            query, result = jax.block_until_ready(self._call("queries", _query, block, strip, statistics))
            for other in starts:
                key, value = (_cut(a, other, other + rows).reshape(batch, -1, channels) for a in (keys, values))
                length = np.full((batch,), min(rows, height - other) * width, np.int32)
                result = self._call("attention", _attend, query, key, value, length if height % rows else None, result)
                jax.block_until_ready(result)  # or the keys of all strips would queue up on the device
            mixed = self._call("mixing", _mix, block, strip, result[0], np.int32(first), np.int32(height))
            _, strip, moment = _fetch(first, mixed)
            self._write(x.array, first, strip)
            moments.append(moment)
        return _Field(x.array, tuple(moments))


def _cut(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    """A copy of rows ``start`` to ``stop``; those outside the array are zero."""
    batch, height, width, channels = array.shape
    low, high = max(start, 0), min(stop, height)
    rows = np.empty((batch, stop - start, width, channels), array.dtype)
    rows[:, : low - start] = 0
    rows[:, low - start : high - start] = array[:, low:high]
    rows[:, high - start :] = 0
    return rows


def _fetch(first: int, result: tuple[jax.Array, ...]) -> tuple[int, np.ndarray, Moments]:
    rows, *moments = map(np.asarray, result)
    return first, rows, tuple(moments)


def iterate_strips(
    vae: Vae, latents: jax.Array | np.ndarray, *, rows: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """`Vae.decode` in strips of rows on one device: exact, no blending; yields rows from top to bottom.

    Device memory is bounded by the strip (`plan_strips` says by how much).  Host memory holds two activations: at full
    resolution ``(widths[0] + widths[1])`` channels for FLUX.1, 29 GB at 6144 x 6144 in bfloat16.

    Args:
        vae: the autoencoder, its parameters on the device.
        latents: raw latents [B, h, w, latent_channels]; computation follows their dtype.
        rows: height of a strip at the finest resolution; at coarser ones strips are higher, of as many pixels.  Default
            what makes about 2^18 pixels, and at least one row.

    Yields:
        First row, and [B, rows, f * w, out_channels] of the image in the dtype of ``latents``; read-only where the
        device is the host.

    Raises:
        ValueError: latents that do not fit, or no rows.
    """
    check_latents(vae, latents)
    strips = _Strips(_positions(vae, latents.shape[2], rows))
    height = vae.config.factor * latents.shape[1]
    x = decode_by_rows(strips, vae, _Field(np.asarray(latents)))
    for first, result, _ in strips.strips(x, vae.decoder.conv_out, norm=vae.decoder.norm_out):
        yield first, result[:, : height - first]


def decode_strips(vae: Vae, latents: jax.Array | np.ndarray, *, rows: int | None = None) -> np.ndarray:
    """The strips of `iterate_strips` joined: images [B, f * h, f * w, out_channels] in the dtype of ``latents``."""
    return np.concatenate([strip for _, strip in iterate_strips(vae, latents, rows=rows)], axis=1)


def _positions(vae: Vae, width: int, rows: int | None) -> int:
    if rows is None:
        return max(POSITIONS, vae.config.factor * width)
    if rows < 1:
        raise ValueError(f"decode in strips: got rows={rows}; expected at least 1")
    return rows * vae.config.factor * width


# -- ahead of time -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StripStage:
    """What the device holds while it runs one compiled function of the strip decode, in bytes.

    Attributes:
        name: what the function does, with the shape of its strip.
        arguments, outputs, temporaries: of one call, from the compiler; arguments include the parameters it uses.
        calls: in flight at once: while a convolution computes, the arguments of the next arrive or the results of the
            last leave; the functions of the attention are waited for.
    """

    name: str
    arguments: int
    outputs: int
    temporaries: int
    calls: int = 2

    @property
    def peak(self) -> int:
        return self.calls * (self.arguments + self.outputs) + self.temporaries


class _Survey(_Strips):
    """Compiles what `_Strips` would run, for the first strip, and runs nothing; arrays take no memory."""

    def __init__(self, positions: int, device: jax.Device | None = None):
        super().__init__(positions)
        self.stages: dict[Any, StripStage] = {}
        self.place = None if device is None else SingleDeviceSharding(device)

    def _call(self, name: str, function: Callable, *arguments: Any, **static: Any) -> Any:
        result = jax.eval_shape(partial(function, **static), *arguments)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        key = function, jax.tree.structure(arguments), *map(str, jax.tree.leaves(abstract)), *static.items()
        if key not in self.stages:
            placed = arguments
            if self.place is not None:
                placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.place), arguments)
            memory = function.lower(*placed, **static).compile().memory_analysis()
            strip = next(x for x in arguments if isinstance(x, np.ndarray) and x.ndim > 2)
            self.stages[key] = StripStage(
                f"{name} {'x'.join(map(str, strip.shape[1:]))}",
                memory.argument_size_in_bytes,
                memory.output_size_in_bytes - memory.alias_size_in_bytes,
                memory.temp_size_in_bytes,
                2 if function is _conv else 1,
            )
        return jax.tree.map(lambda x: np.broadcast_to(np.ones((), x.dtype), x.shape), result)

    def _empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype), shape)

    def _starts(self, height: int, rows: int) -> range:
        return range(0, min(height, 1), rows)

    def _write(self, array: np.ndarray, first: int, rows: np.ndarray) -> None:
        del array, first, rows


def plan_strips(
    vae: Vae,
    height: int,
    width: int,
    *,
    rows: int | None = None,
    batch: int = 1,
    dtype: DTypeLike = jnp.float32,
    device: jax.Device | None = None,
) -> list[StripStage]:
    """Compiles the functions of `iterate_strips` without running them.

    Args:
        vae: the autoencoder; its parameters may be abstract (`jax.ShapeDtypeStruct`).
        height, width: of the image, in pixels; multiples of ``vae.config.factor``.
        rows, batch, dtype: as the decode will have them.
        device: to compile for; default the default device.

    Returns:
        One entry per compiled function.

    Raises:
        ValueError: sides that do not divide, or no rows.
    """
    factor = vae.config.factor
    if height < 1 or width < 1 or height % factor or width % factor:
        raise ValueError(f"plan_strips: got {width}x{height}; expected positive multiples of {factor}")
    survey = _Survey(_positions(vae, width // factor, rows), device)
    shape = (batch, height // factor, width // factor, vae.config.latent_channels)
    x = decode_by_rows(survey, vae, _Field(survey._empty(shape, dtype)))
    survey.conv(x, vae.decoder.conv_out, norm=vae.decoder.norm_out)
    return list(survey.stages.values())

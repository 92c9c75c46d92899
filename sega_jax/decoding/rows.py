"""The exact decode by rows: one walk of the decoder, and its form over a mesh.

Two things of the autoencoder's decoder reach across rows: 3x3 convolutions, which need one row of each neighbour, and
group norms and the mid-block attention, which need the whole picture.  `decode_by_rows` walks the modules of
`sega_jax.models.vae.Vae` and asks for each of these; `decode_sharded` answers on a mesh (halos by permutation,
statistics by sums over the devices), `sega_jax.decoding.strips` on one device, strip after strip.  Both equal the
plain decode up to the rounding of sums.

Rows are cut evenly and the last ones filled up.  A filling row never enters a statistic or an attention, and enters a
convolution as the zero row that the plain one has below the picture.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sega_jax.attention import attention
from sega_jax.models.layers import Conv, GroupNorm
from sega_jax.models.vae import ResnetBlock, SpatialAttention, Vae, double
from sega_jax.sharding.mesh import put, to_host

Axes = str | tuple[str, ...]


class Rows(Protocol):
    """What the decoder needs of activations that are cut into rows; ``x`` and results are of the answerer's type."""

    def conv(
        self,
        x: Any,
        conv: Conv,
        *,
        norm: GroupNorm | None = None,
        doubled: bool = False,
        residual: Any = None,
        shortcut: Conv | None = None,
    ) -> Any:
        """``conv(x)``; of ``silu(norm(x))`` given ``norm``, of ``double(x)`` if ``doubled``.

        ``residual``, through ``shortcut`` where there is one, is added; ``x`` is not needed any more then.
        """

    def resnets(self, x: Any, blocks: Sequence[ResnetBlock]) -> Any:
        """``blocks`` one after the other; ``x`` is not needed any more."""

    def attention(self, x: Any, block: SpatialAttention) -> Any:
        """``block(x)``; ``x`` is not needed any more."""


def resnet(rows: Rows, x: Any, block: ResnetBlock) -> Any:
    """``block(x)``; ``x`` is not needed any more."""
    y = rows.conv(x, block.conv1, norm=block.norm1)
    return rows.conv(y, block.conv2, norm=block.norm2, residual=x, shortcut=block.shortcut)


def decode_by_rows(rows: Rows, vae: Vae, latents: Any) -> Any:
    """`Vae.decode` without its last norm and convolution; ``latents`` and the result are as ``rows`` has them."""
    decoder = vae.decoder
    x = latents if vae.post_quant_conv is None else rows.conv(latents, vae.post_quant_conv)
    x = rows.resnets(rows.conv(x, decoder.conv_in), [decoder.middle.before])
    if decoder.middle.attention is not None:
        x = rows.attention(x, decoder.middle.attention)
    blocks = [decoder.middle.after]
    for up in decoder.up:
        x = rows.resnets(x, [*blocks, *up.resnets])
        blocks = []
        if up.upsample is not None:
            x = rows.conv(x, up.upsample, doubled=True)
    return x


def visible(count: int, first: jax.Array | int, height: jax.Array | int) -> jax.Array:
    """Which of ``count`` rows from row ``first`` on are rows of a picture of ``height``: bool [1, count, 1, 1]."""
    index = first + jnp.arange(count, dtype=jnp.int32)
    return ((index >= 0) & (index < height))[None, :, None, None]


def prepare(
    x: jax.Array,
    norm: GroupNorm | None,
    statistics: tuple[jax.Array, jax.Array] | None,
    first: jax.Array | int,
    height: jax.Array | int,
) -> jax.Array:
    """What a convolution of rows ``first``… sees: ``silu(norm(x))`` given ``norm``, zero outside the picture."""
    if norm is not None:
        x = jax.nn.silu(norm.normalize(x, *statistics))
    return jnp.where(visible(x.shape[1], first, height), x, jnp.zeros((), x.dtype))


def convolve(x: jax.Array, conv: Conv, doubled: bool) -> jax.Array:
    """``conv`` of ``x`` (of ``double(x)``) [B, R, W, C] that carries `halo` extra rows on either side, without them."""
    if doubled:
        x = double(x)[:, 1:-1]
    return conv(x, rows=(0, 0))


def halo(conv: Conv) -> int:
    """Rows of each neighbour that ``conv`` needs; with doubling too, where one row gives two."""
    return conv.padding[0]


def check_latents(vae: Vae, latents: jax.Array | np.ndarray) -> None:
    """Raises ValueError for latents that ``vae`` cannot decode."""
    channels = vae.config.latent_channels
    if latents.ndim != 4 or latents.shape[-1] != channels or 0 in latents.shape:
        raise ValueError(f"decode: got latents {latents.shape}; expected [B, h, w, {channels}], none of them zero")


def _stack(modules: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *modules)


# -- over a mesh -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slab:
    """Rows of one device: ``rows`` [B, R, W, C] of a picture that is ``height`` rows high over all devices."""

    rows: jax.Array
    height: int


@dataclasses.dataclass(frozen=True)
class _Slabs:
    """`Rows` inside `jax.shard_map`, rows over mesh ``axes`` of ``count`` devices."""

    axes: Axes
    count: int

    def _first(self, x: _Slab) -> jax.Array:
        return jax.lax.axis_index(self.axes) * x.rows.shape[1]

    def _statistics(self, x: _Slab, norm: GroupNorm) -> tuple[jax.Array, jax.Array]:
        batch, rows, width, channels = x.rows.shape
        seen = visible(rows, self._first(x), x.height)
        groups = (batch, norm.groups, channels // norm.groups)

        def mean(y: jax.Array) -> jax.Array:
            total = jax.lax.psum(jnp.where(seen, y, 0.0).sum((1, 2)), self.axes) / (x.height * width)
            total = total.reshape(groups).mean(-1, keepdims=True)
            return jnp.broadcast_to(total, groups).reshape(batch, 1, 1, channels)

        y = x.rows.astype(jnp.float32)
        center = mean(y)
        return center, jax.lax.rsqrt(mean(jnp.square(y - center)) + norm.epsilon)

    def _with_halo(self, x: jax.Array, size: int) -> jax.Array:
        """``x`` between the neighbours' nearest rows; beyond the first and last device, zeros."""
        if size == 0:
            return x
        above = jax.lax.ppermute(x[:, -size:], self.axes, [(i, i + 1) for i in range(self.count - 1)])
        below = jax.lax.ppermute(x[:, :size], self.axes, [(i + 1, i) for i in range(self.count - 1)])
        return jnp.concatenate([above, x, below], axis=1)

    def conv(
        self,
        x: _Slab,
        conv: Conv,
        *,
        norm: GroupNorm | None = None,
        doubled: bool = False,
        residual: _Slab | None = None,
        shortcut: Conv | None = None,
    ) -> _Slab:
        statistics = None if norm is None else self._statistics(x, norm)
        y = prepare(x.rows, norm, statistics, self._first(x), x.height)
        y = convolve(self._with_halo(y, halo(conv)), conv, doubled)
        if residual is not None:
            y = y + (residual.rows if shortcut is None else shortcut(residual.rows))
        return _Slab(y, x.height * (2 if doubled else 1))

    def resnets(self, x: _Slab, blocks: Sequence[ResnetBlock]) -> _Slab:
        """Blocks without a shortcut are two equal halves each, so a run of them is one convolution in two loops.

        A TPU's compiler takes about eight seconds for every convolution that it sees.
        """
        for change, run in itertools.groupby(blocks, lambda block: block.shortcut is not None):
            if change:
                for block in run:
                    x = resnet(self, x, block)
                continue
            halves = [_stack([(b.norm1, b.conv1), (b.norm2, b.conv2)]) for b in run]

            def half(rows: jax.Array, layer: Any, height: int = x.height) -> tuple[jax.Array, None]:
                norm, conv = layer
                return self.conv(_Slab(rows, height), conv, norm=norm).rows, None

            def block(rows: jax.Array, layers: Any) -> tuple[jax.Array, None]:
                return jax.lax.scan(half, rows, layers)[0] + rows, None

            x = dataclasses.replace(x, rows=jax.lax.scan(block, x.rows, _stack(halves))[0])
        return x

    def attention(self, x: _Slab, block: SpatialAttention) -> _Slab:
        batch, rows, width, channels = x.rows.shape
        tokens = block.norm.normalize(x.rows, *self._statistics(x, block.norm))
        tokens = tokens.reshape(batch, rows * width, channels)

        def everywhere(y: jax.Array) -> jax.Array:
            # Filling rows come last on the last devices: what is left is the picture, in order.
            whole = jax.lax.all_gather(y, self.axes, axis=1, tiled=True)
            return whole[:, : x.height * width, None, :]

        query = block.query(tokens)[:, :, None, :]
        mixed = attention(query, everywhere(block.key(tokens)), everywhere(block.value(tokens)))
        return dataclasses.replace(x, rows=x.rows + block.out(mixed[:, :, 0, :]).reshape(x.rows.shape))


@partial(jax.jit, static_argnames=("mesh", "axes", "height"))
def decode_slabs(vae: Vae, latents: jax.Array, *, mesh: Mesh, axes: Axes, height: int) -> jax.Array:
    """Decode of raw latents whose rows lie on the devices of ``axes``; lowers ahead of time as it is.

    Args:
        vae: the autoencoder, replicated.
        latents: [B, n * r, w, latent_channels], ``n`` devices with ``r`` rows each, of which the first ``height`` are
            the picture's; sharded ``P(None, axes)``.
        mesh: devices; ``axes``: its axis, or axes, to cut rows over.
        height: rows of the latents.

    Returns:
        Images [B, f * n * r, f * w, out_channels] in the dtype of ``latents``, sharded as they are; rows from
        ``f * height`` on mean nothing.
    """

    def local(vae: Vae, latents: jax.Array) -> jax.Array:
        slabs = _Slabs(axes, count)
        x = decode_by_rows(slabs, vae, _Slab(latents, height))
        return slabs.conv(x, vae.decoder.conv_out, norm=vae.decoder.norm_out).rows

    count = _size(mesh, axes)
    by_rows = PartitionSpec(None, axes)
    # Attention kernels start their loops from constants, which the check of varying axes would refuse.
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), by_rows), out_specs=by_rows, check_vma=False)
    return mapped(vae, latents)


def decode_sharded(vae: Vae, latents: jax.Array | np.ndarray, *, mesh: Mesh, axes: Axes | None = None) -> np.ndarray:
    """`Vae.decode` with rows over the devices of a mesh: exact, no blending.

    A device holds its rows' share of every activation, all parameters, and at the lowest resolution the keys and values
    of the whole picture (at 6144 x 6144 in bfloat16 twice 0.6 GB).

    Args:
        vae: the autoencoder; its parameters may be sharded, and are replicated.
        latents: raw latents [B, h, w, latent_channels]; computation follows their dtype.  ``h`` need not divide.
        mesh: devices; of several processes, each gets the whole images.
        axes: axis or axes of the mesh to cut rows over; default all of them.

    Returns:
        Images [B, f * h, f * w, out_channels] on the host, in the dtype of ``latents``.

    Raises:
        ValueError: latents that do not fit, or an axis that the mesh does not have.
    """
    check_latents(vae, latents)
    axes = tuple(mesh.axis_names) if axes is None else axes
    if unknown := set([axes] if isinstance(axes, str) else axes) - set(mesh.axis_names):
        raise ValueError(f"decode_sharded: axes {sorted(unknown)} are not in the mesh {dict(mesh.shape)}")
    height, factor = latents.shape[1], vae.config.factor
    filling = -height % _size(mesh, axes)
    filled = np.pad(np.asarray(latents), ((0, 0), (0, filling), (0, 0), (0, 0)))
    filled = put(filled, NamedSharding(mesh, PartitionSpec(None, axes)))
    vae = jax.device_put(vae, NamedSharding(mesh, PartitionSpec()))
    images = decode_slabs(vae, filled, mesh=mesh, axes=axes, height=height)
    return to_host(images)[:, : factor * height]


def _size(mesh: Mesh, axes: Axes) -> int:
    return int(np.prod([mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes)]))

"""What a picture needs, from closed forms: memory and traffic of a device, without compiling anything.

`sega-jax plan` prints these beside what the compiler says, `generate` asks them before it loads a model, and the mesh
is chosen by them.  Per device of a mesh of d x c x t devices (data, context, tensor), for N image tokens, T text
tokens, width W, B rows and b bytes per number:

* parameters: every dimension divided as `sharding.rules` divides it;
* a step's temporaries: `STEP_COPIES` arrays of ``B/d (N/c + T) W`` numbers, the widest moment of a block, and, where
  weights are sharded, those of two double blocks, one at work and one arriving;
* traffic of a step: weights gathered over d c devices, ``(dc - 1) / dc`` of all of them; Ulysses over u devices, per
  block ``2 (1 + g) (u - 1) / u`` of a ``B/d N/c W/t`` array, where the keys have g times the heads of the queries; a
  ring over r devices, per block ``2 g`` of those (times ``u / c`` of its tokens) r times; tensor sharding,
  ``2 (t - 1) / t`` of a ``B/d (N/c + T) W`` array per product that sums over it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from sega_jax.families.base import Parts, abstract_component
from sega_jax.families.registry import family_named
from sega_jax.models.abstract import Component
from sega_jax.models.denoiser import NetworkConfig
from sega_jax.models.quantized import available, scales

STEP_COPIES = 12  # 11.3 compiled for one H200 with our kernel at 6144 x 6144
DECODE_COPIES = 4  # arrays of the widest resolution in a decode
STRIP_DECODE_BYTES = 3 * 2**30
MORE = (2, 4, 8, 16, 32, 64)  # devices that `remedies` tries
SINGLE = {"data": 1, "context": 1, "tensor": 1}

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class _Shape:
    """As much of a mesh as the rules need."""

    shape: Sizes


def parameter_bytes(component: Component, sizes: Sizes = SINGLE) -> int:
    """Bytes of a component's parameters on one device of a mesh of ``sizes``."""
    from sega_jax.sharding.rules import spec

    total = 0
    for _, param in nnx.to_flat_state(component.params):
        parts = spec(param.get_metadata()["out_sharding"], param.shape, _Shape(sizes))
        shares = math.prod(
            sizes[axis] for part in parts if part for axis in ([part] if isinstance(part, str) else part)
        )
        total += math.prod(param.shape) * param.dtype.itemsize // shares
    return total


@dataclass(frozen=True)
class Estimate:
    """Bytes of one device.

    Attributes:
        transformer, encoders, vae: parameters.
        step, encode, decode: temporaries, inputs and outputs of each stage.
        sent: by one denoising step to other devices.
        decode_how: ``"plain"``, ``"sharded"`` or ``"strips"``.
    """

    transformer: int
    encoders: int
    vae: int
    encode: int
    step: int
    decode: int
    sent: int
    decode_how: str

    @property
    def resident(self) -> int:
        """All parameters."""
        return self.transformer + self.encoders + self.vae

    def peak(self, residency: str = "all") -> int:
        """Most bytes at once: with all parameters there, or (``"offload"``) those of one stage at a time."""
        stages = (self.encoders, self.encode), (self.transformer, self.step), (self.vae, self.decode)
        if residency == "all":
            return self.resident + max(work for _, work in stages)
        return max(parameters + work for parameters, work in stages)


def estimate(
    parts: Parts, height: int, width: int, *, rows: int = 1, sizes: Sizes = SINGLE, scheme: str = "auto"
) -> Estimate:
    """Closed forms for a picture of ``height`` x ``width`` pixels, ``rows`` of them per model call.

    Args:
        parts: of the model; abstract ones will do.
        rows: twice the batch with true guidance.
        sizes: devices along each mesh axis.
        scheme: context scheme of `attention.context.route`.
    """
    config = parts.transformer_config
    side = parts.rope.pixels_per_token
    image, text = (height // side) * (width // side), parts.text_tokens
    data, context, tensor = (sizes[name] for name in ("data", "context", "tensor"))
    devices = data * context * tensor
    mine = -(-rows // data)
    number, block = _dtype(parts.transformer).itemsize, largest_block(parts.transformer) // tensor
    tokens = -(-image // context) + text
    array = mine * tokens * config.width * number
    whole = parameter_bytes(parts.transformer)
    step = STEP_COPIES * array + (2 * block if devices > 1 else 0)

    sent = traffic(config, image, text, rows=rows, sizes=sizes, number=number, weights=whole,
                   scheme=scheme)  # fmt: skip
    how, decode = decode_bytes(parts, height, width, devices)
    reader = parameter_bytes(parts.encoders[family_named(parts.family).prompt_encoder])
    return Estimate(
        transformer=parameter_bytes(parts.transformer, sizes),
        encoders=sum(parameter_bytes(encoder, sizes) for encoder in parts.encoders.values()),
        vae=parameter_bytes(parts.vae, sizes),
        encode=mine * text * config.text_dim * 16 * number + (reader // 12 if devices > 1 else 0),
        step=step,
        decode=decode,
        sent=sum(sent.values()),
        decode_how=how,
    )


def _dtype(component: Component) -> jnp.dtype:
    """Of the parameters that are not stacked blocks, which stay as they are where blocks are in int8."""
    loose = (p for _, p in nnx.to_flat_state(component.params) if "layers" not in p.get_metadata()["out_sharding"])
    return jnp.dtype(next(loose).dtype)


def largest_block(component: Component) -> int:
    """Bytes of the largest block: of what is stacked, by stack, a layer's share."""
    stacks: dict[str, int] = {}
    for path, param in nnx.to_flat_state(component.params):
        if param.get_metadata()["out_sharding"][0] == "layers":
            share = math.prod(param.shape[1:]) * param.dtype.itemsize
            stacks[path[0]] = stacks.get(path[0], 0) + share
    return max(stacks.values())


def traffic(
    config: NetworkConfig,
    image: int,
    text: int,
    *,
    rows: int,
    sizes: Sizes,
    number: int,
    weights: int,
    scheme: str = "auto",
    kv_heads: int | None = None,
) -> dict[str, int]:
    """Bytes out of one device in one step, by purpose: ``weights``, ``context``, ``tensor`` (closed forms above).

    ``kv_heads`` of the keys; None is as many as the queries have.
    """
    from sega_jax.attention.context.route import choose_scheme

    data, context, tensor = (sizes[name] for name in ("data", "context", "tensor"))
    mine = -(-rows // data)
    gathered = data * context
    own = mine * -(-image // context) * config.width // tensor * number
    along = 0
    if context > 1:
        heads = (kv_heads or config.heads) // tensor
        of_keys = (kv_heads or config.heads) / config.heads
        _, degree = choose_scheme(heads, context, joint=True, scheme=scheme)
        padded = -(-heads // degree) * degree / heads
        around = context // degree
        along = 2 * (1 + of_keys) * (degree - 1) / degree * own * padded
        along += 2 * of_keys * own * padded * around if around > 1 else 0
    local = mine * (-(-image // context) + text) * config.width * number
    return {
        "weights": round(weights / tensor * (gathered - 1) / gathered),
        "context": round(config.blocks * along),
        "tensor": round(config.reductions * 2 * (tensor - 1) / tensor * local),
    }


def decode_bytes(parts: Parts, height: int, width: int, devices: int = 1) -> tuple[str, int]:
    """How pictures of this size are decoded, and what that takes on one device beside the parameters."""
    from sega_jax.decoding.decode import PLAIN_DECODE_BYTES

    config = parts.vae_config
    number = jax.tree.leaves(parts.vae.params)[0].dtype.itemsize
    field = height * width * config.widest * number
    if devices > 1:
        tokens = (height // config.factor) * (width // config.factor)
        return "sharded", DECODE_COPIES * field // devices + 2 * tokens * config.narrowest_width * number
    if 3 * field > PLAIN_DECODE_BYTES:
        return "strips", STRIP_DECODE_BYTES
    return "plain", DECODE_COPIES * field


def candidates(devices: int, rows: int, heads: int) -> list[dict[str, int]]:
    """Meshes of all ``devices`` that this many rows and heads can use."""
    found = []
    for data in range(1, devices + 1):
        for tensor in range(1, devices // data + 1):
            if devices % (data * tensor) or rows % data or heads % tensor:
                continue
            found.append({"data": data, "context": devices // data // tensor, "tensor": tensor})
    return found


def choose(
    parts: Parts, height: int, width: int, devices: int, *, batch: int = 1, rows: int = 1, memory: int | None = None,
    joint: bool = True, residency: str = "all",
) -> tuple[dict[str, int], Estimate]:  # fmt: skip
    """The mesh of all ``devices`` that fits into ``memory`` bytes each with the least traffic, and its estimate.

    Where none fits, the one that needs least memory.

    Args:
        batch: pictures per model call, which the data axis divides; ``rows``: of the model, as of `estimate`.
        joint: whether the layout is dense; others are served by Ulysses alone, on at most as many devices as heads.
        residency: ``"all"`` parameters at once on the devices, or (``"offload"``) those of one stage.
    """
    heads = parts.transformer_config.heads
    known = []
    for sizes in candidates(devices, batch, heads):
        if not joint and sizes["context"] > heads // sizes["tensor"]:
            continue
        found = estimate(parts, height, width, rows=rows, sizes=sizes)
        over = 0 if memory is None else max(0, found.peak(residency) - memory)
        known.append((over, found.sent, -sizes["data"], -sizes["context"], sizes, found))
    if not known:
        raise ValueError(f"no mesh of {devices} devices can serve {heads} heads; use a divisor of the devices")
    best = min(known, key=lambda one: one[:4])
    return best[4], best[5]


def remedies(
    parts: Parts, height: int, width: int, devices: int, memory: int, *, batch: int, rows: int, kind: str,
    residency: str = "all",
) -> list[str]:  # fmt: skip
    """What would fit where this does not, by the same closed forms: options of `generate`, more devices, a size.

    Args:
        devices, memory: how many there are, with how many bytes each, called ``kind``.
        batch, rows, residency: as of `choose`.
    """
    each = rows // batch

    def fits(count: int = devices, size: tuple[int, int] = (height, width), pictures: int = batch,
             where: str = residency, what: Parts = parts) -> bool:  # fmt: skip
        options = {"batch": pictures, "rows": each * pictures, "memory": memory, "residency": where}
        return choose(what, *size, count, **options)[1].peak(where) <= memory

    said = []
    if batch > 1 and fits(pictures=1):
        said.append("--batch-size 1")
    if residency == "all" and fits(where="offload"):
        said.append("--residency offload")
    if not scales(nnx.merge(parts.transformer.graphdef, parts.transformer.params)) and available():
        network = family_named(parts.family).network(parts, "int8")
        component = abstract_component(network, _dtype(parts.transformer))
        small = replace(parts, transformer=component)
        held = next((where for where in dict.fromkeys((residency, "offload")) if fits(where=where, what=small)), None)
        if held is not None:
            said.append("--weights int8" + (f" --residency {held}" if held != residency else ""))
    more = next((count for count in MORE if count > devices and fits(count)), None)
    if more is not None:
        said.append(f"{more} x {kind}")
    step = 16 * parts.rope.pixels_per_token
    for share in range(95, 5, -5):
        size = tuple(side * share // 100 // step * step for side in (height, width))
        if min(size) >= step and fits(size=size):
            said.append(f"--size {size[1]}x{size[0]}")
            break
    return said

"""Unmerged low-rank adapters: a change of linear layers that only chosen streams see.

``y = x @ kernel + bias + (x @ a) @ b``, with ``a`` [in, rank], ``b`` [rank, out] (Hu et al., arXiv 2106.09685; the
scale ``alpha / rank`` is multiplied into ``b``).  A LoRA for all streams is better merged into the weights as they
are read; this is for Scale-DiT, whose LoRA belongs to the small clean stream.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save as save_safetensors

from converters.errors import CheckpointError
from converters.files import atomic_path
from converters.keymap import Slot
from converters.lora import Factors, Lora, express
from converters.reading.formats import open_tensors
from sega_jax.models.abstract import axes, parameters
from sega_jax.models.layers import Linear

ATTENTION = ("attention.query", "attention.key", "attention.value")
# what the released FLUX.1 weights change (target_modules of Scale-DiT's train.yaml), as layers of the image side
FULL = ("image_embed", *(f"double.image.{name}" for name in ("modulation", *ATTENTION, "attention_out", "mlp_out")),
        *(f"single.{name}" for name in ("modulation", *ATTENTION, "mlp_in", "out")))  # fmt: skip
PARTIAL = tuple(name for name in FULL if not name.endswith("modulation"))  # their "partial" variant


class LowRank(nnx.Module):
    """The change of one linear layer, or of a stack of them."""

    def __init__(self, a: jax.Array, b: jax.Array, kernel_axes: tuple[str | None, ...]):
        *lead, into, out = kernel_axes
        with nnx.use_eager_sharding(False):
            self.a = nnx.Param(a, out_sharding=(*lead, into, None))
            self.b = nnx.Param(b, out_sharding=(*lead, None, out))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.matmul(jnp.matmul(x, self.a[...].astype(x.dtype)), self.b[...].astype(x.dtype))


class Adapters(nnx.Module):
    """Adapters of a FLUX.1 transformer, by layer name below the image side.

    Attributes:
        image_embed: of the embedder, or None.
        double: layer of the image half of double blocks -> stacked adapter.
        single: layer of single blocks -> stacked adapter.
    """

    def __init__(self, layers: Mapping[str, LowRank]):
        self.image_embed = layers.get("image_embed")
        self.double = nnx.Dict(_below(layers, "double.image."))
        self.single = nnx.Dict(_below(layers, "single."))

    def layers(self) -> dict[str, LowRank]:
        """Adapters by full layer name, such as ``double.image.attention.query``."""
        found = {} if self.image_embed is None else {"image_embed": self.image_embed}
        found |= {f"double.image.{name}": x for name, x in self.double.items()}
        return found | {f"single.{name}": x for name, x in self.single.items()}


def _below(layers: Mapping[str, LowRank], prefix: str) -> dict[str, LowRank]:
    return {name.removeprefix(prefix): x for name, x in layers.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class _Adapted:
    """A layer and its change, called like the layer."""

    layer: Linear
    change: LowRank

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x) + self.change(x)

    def of_parts(self, *parts: jax.Array) -> jax.Array:
        return self.layer.of_parts(*parts) + self.change(jnp.concatenate(parts, axis=-1))


def adapted(module: nnx.Module, changes: Mapping[str, LowRank] | None, which: str | None) -> nnx.Module:
    """A copy of ``module`` whose layers carry their changes; itself where there are none.

    Args:
        module: a block or half of one, whose layers ``changes`` names by dotted path.
        changes: adapters, or None.
        which: ``"all"``, ``"attention"`` (queries, keys and values only), or None for none.
    """
    names = [] if changes is None or which is None else [n for n in changes if which == "all" or n in ATTENTION]
    if not names:
        return module
    result = copy.copy(module)
    copies: dict[str, nnx.Module] = {}
    for name in names:
        owner, (*path, last) = result, name.split(".")
        for depth, part in enumerate(path):
            key = ".".join(path[: depth + 1])
            if key not in copies:
                copies[key] = copy.copy(getattr(owner, part))
                setattr(owner, part, copies[key])
            owner = copies[key]
        setattr(owner, last, nnx.static(_Adapted(getattr(owner, last), changes[name])))
    return result


def _kernel(params: Mapping[str, nnx.Param], layer: str) -> nnx.Param:
    if f"{layer}.kernel" not in params:
        raise ValueError(f"target {layer!r}: the transformer has no such layer")
    return params[f"{layer}.kernel"]


def create(transformer: nnx.Module, rank: int, key: jax.Array, targets: Iterable[str] = FULL) -> Adapters:
    """Adapters that change nothing yet: ``a`` normal with standard deviation 1 / rank, ``b`` zero, float32.

    Args:
        transformer: real or abstract; only shapes are read.
        rank: of every adapter.
        key: random key.
        targets: layer names.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r}: expected a positive whole number")
    params = parameters(transformer)
    layers = {}
    for number, name in enumerate(targets):
        kernel = _kernel(params, name)
        *lead, into, out = kernel.shape
        a = jax.random.normal(jax.random.fold_in(key, number), (*lead, into, rank), jnp.float32) / rank
        layers[name] = LowRank(a, jnp.zeros((*lead, rank, out), jnp.float32), axes(kernel))
    return Adapters(layers)


def from_lora(transformer: nnx.Module, lora: Lora, *, weight: float = 1.0) -> Adapters:
    """`from_factors` of a LoRA that changes layers of the transformer and nothing else.

    Raises:
        CheckpointError: as `from_factors`, or it changes other components, or replaces or adds to norms and biases.
    """
    others = sorted(lora.components - {"transformer"})
    others += ["values of norms and biases"] * bool(lora.replaced or lora.added)
    if others:
        raise CheckpointError(
            f"{lora.name}: no LoRA of a guidance stream: it also changes {', '.join(others)}; merge it into the "
            "weights instead: sega-jax convert"
        )
    return from_factors(transformer, lora.factors.get("transformer", {}), weight=weight, name=lora.name)


def from_factors(
    transformer: nnx.Module, factors: Mapping[Slot, Factors], *, weight: float = 1.0, name: str = "LoRA"
) -> Adapters:
    """Adapters from a LoRA that was read, stacked over layers; absent layers get zeros, smaller ranks are padded.

    Args:
        transformer: real or abstract; only shapes are read.
        factors: the transformer's part of a `converters.lora.Lora`.
        weight: multiplies the change.
        name: for messages.

    Raises:
        CheckpointError: it changes something the guidance stream does not use (the text side, biases, the output),
            or other shapes.
    """
    params = parameters(transformer)
    by_layer: dict[str, dict[int | None, Factors]] = {}
    problems = []
    for slot, factor in factors.items():
        layer = slot.path.removesuffix(".kernel")
        usable = layer == "image_embed" or layer.startswith(("double.image.", "single."))
        if not usable or f"{layer}.kernel" not in params or factor.bias is not None:
            what = "changes a bias of" if factor.bias is not None else "changes"
            problems.append(f"{what} {layer}, which the guidance stream has no use for")
            continue
        *lead, into, out = params[f"{layer}.kernel"].shape
        shape = (into, out)
        if slot.index is not None and not (lead and slot.index < lead[0]):
            problems.append(f"{layer} has {lead[0] if lead else 'no'} layers, the LoRA changes number {slot.index}")
            continue
        if (factor.a.shape[1], factor.b.shape[0]) != shape:
            problems.append(f"{layer} is {shape}, the LoRA is for {(factor.a.shape[1], factor.b.shape[0])}")
            continue
        by_layer.setdefault(layer, {})[slot.index] = factor
    if problems or not by_layer:
        shown = "\n  ".join(problems[:10] or ["changes no layer of the transformer"])
        raise CheckpointError(
            f"{name}: no LoRA of a guidance stream ({len(problems)} problems):\n  {shown}\n"
            "  merge LoRAs of other kinds into the weights instead: sega-jax convert"
        )
    layers = {}
    for layer, found in by_layer.items():
        kernel = params[f"{layer}.kernel"]
        rank = max(factor.rank for factor in found.values())
        *lead, into, out = kernel.shape
        a, b = np.zeros((*lead, into, rank), np.float32), np.zeros((*lead, rank, out), np.float32)
        for index, factor in found.items():
            at = () if index is None else index
            a[at][..., : factor.rank] = factor.a.astype(np.float32).T
            b[at][..., : factor.rank, :] = np.float32(weight * factor.scale) * factor.b.astype(np.float32).T
        layers[layer] = LowRank(jnp.asarray(a), jnp.asarray(b), axes(kernel))
    return Adapters(layers)


def to_factors(adapters: Adapters) -> dict[Slot, Factors]:
    """Adapters as a LoRA to be written: one pair of float32 factors per layer."""
    factors = {}
    for layer, change in adapters.layers().items():
        a, b = np.asarray(change.a[...], np.float32), np.asarray(change.b[...], np.float32)
        if a.ndim == 2:
            factors[Slot(f"{layer}.kernel")] = Factors(a.T.copy(), b.T.copy())
        else:
            for index in range(len(a)):
                factors[Slot(f"{layer}.kernel", index)] = Factors(a[index].T.copy(), b[index].T.copy())
    return factors


def size(adapters: Adapters) -> int:
    """Number of scalar parameters."""
    return sum(math.prod(param.shape) for param in parameters(adapters).values())


# -- files ---------------------------------------------------------------------------------------------------------

SETTINGS_KEY = "scale-dit"  # of a safetensors file's metadata: how the LoRA was trained, as JSON


def attach(module: nnx.Module, adapters: Adapters | None) -> nnx.Module:
    """The transformer with these adapters for the streams that ask for them; the module itself is changed."""
    module.adapters = nnx.data(adapters)
    return module


def guidance_settings(path: Path) -> dict[str, Any]:
    """What a LoRA file says about its training: ``layout``, ``positional``, ``adapt``; empty where it says nothing."""
    if not path.is_file():
        return {}
    with open_tensors(path) as source:
        text = source.metadata.get(SETTINGS_KEY)
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its {SETTINGS_KEY} settings are no JSON ({error})") from error
    known = ("layout", "positional", "adapt")
    if not isinstance(settings, dict) or any(not isinstance(settings.get(name, ""), str) for name in known):
        raise CheckpointError(f"{path}: its {SETTINGS_KEY} settings are not those of a LoRA of this package")
    return {name: settings[name] for name in known if name in settings}


def save(path: Path, adapters: Adapters, settings: Mapping[str, str]) -> None:
    """Adapters as a LoRA that diffusers and PEFT read, with the settings of their training; whole or not at all."""
    tensors = express(Lora({"transformer": to_factors(adapters)}, name=path.name), "diffusers")
    data = save_safetensors(dict(tensors), metadata={"format": "pt", SETTINGS_KEY: json.dumps(dict(settings))})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)

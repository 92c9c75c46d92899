"""``--verify=forward``: the same inputs through every block of the source and of the output.

A key map that is merely invertible passes any round trip; a wrong one changes what a block computes.  Each side is
run by what defines its layout: modules of diffusers and transformers for their folders,
`converters.verify.reference` for BFL's names and for Orbax.  One block is in memory at a time, in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from converters.components import Part
from converters.errors import CheckpointError
from converters.reading.sources import is_float

try:
    import diffusers
    import torch
    import transformers
except ImportError as exc:
    raise CheckpointError(
        f"--verify=forward needs torch, diffusers and transformers ({exc}); pip install 'sega-jax[parity]', "
        "or use --verify, which needs nothing"
    ) from exc

from converters.verify import reference

BOUND = 1e-4  # largest difference over largest value of a block's output: float32 in another order
_IMAGE, _TEXT = 6, 4  # tokens
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class _Side:
    """One checkpoint's component: its layout, its tensors as torch float32, its modules.

    Args:
        part: the component.
        rounded: type to round to first, so that only the map is compared and not the change of type.
    """

    def __init__(self, part: Part, rounded: np.dtype | None):
        self.part, self.rounded = part, rounded
        self.layout = part.layout

    def tensors(self, prefix: str = "", strip: bool = True) -> dict[str, torch.Tensor]:
        """Tensors whose names begin with ``prefix``, which is cut off."""
        found = {}
        for name in self.part.source.keys():  # noqa: SIM118
            if name.startswith(prefix):
                found[name[len(prefix) if strip else 0 :]] = self._read(name)
        return found

    def layer(self, prefix: str, index: int) -> dict[str, torch.Tensor]:
        """Parameters of layer ``index`` in Orbax, by their path below ``prefix``."""
        found = {}
        for name in self.part.source.keys():  # noqa: SIM118
            path, _, last = name.rpartition(".")
            if last == str(index) and path.startswith(prefix):
                found[path[len(prefix) :]] = self._read(name)
        return found

    def _read(self, name: str) -> torch.Tensor:
        view = self.part.source.view(name)
        if self.rounded is not None and is_float(view.dtype):
            view = view.astype(self.rounded)
        return torch.from_numpy(np.array(view, np.float32, order="C"))


def _load(module: torch.nn.Module, state: dict[str, torch.Tensor], ignore: str = "$^") -> torch.nn.Module:
    missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    wrong = [name for name in (*missing, *unexpected) if not re.search(ignore, name)]
    if wrong:
        raise CheckpointError(f"forward verification: the reference module and the checkpoint differ in {wrong[:5]}")
    return module.eval()


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- FLUX.1 --------------------------------------------------------------------------------------------------------


def _flux_config(part: Part) -> dict[str, Any]:
    keys = (
        "in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope",
    )  # fmt: skip
    return {key: part.config[key] for key in keys if key in part.config}


def _flux(side: _Side) -> Iterator[tuple[str, Callable[[], list[torch.Tensor]]]]:
    config = _flux_config(side.part)
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    width = heads * size
    image, text = _random(1, _IMAGE, width, seed=1), _random(1, _TEXT, width, seed=2)
    condition = _random(1, width, seed=3)
    angles = _random(_IMAGE + _TEXT, size // 2, seed=4).repeat_interleave(2, -1)
    rope = angles.cos(), angles.sin()

    def double(i: int) -> list[torch.Tensor]:
        if side.layout == "diffusers":
            with torch.device("meta"):
                block = diffusers.models.transformers.transformer_flux.FluxTransformerBlock(width, heads, size)
            _load(block, side.tensors(f"transformer_blocks.{i}."))
            return list(block(image, text, condition, rope))
        weights = side.layer("double.", i) if side.layout == "orbax" else side.tensors(f"double_blocks.{i}.")
        return list(reference.double_block(weights, side.layout, image, text, condition, *rope, heads))

    def single(i: int) -> list[torch.Tensor]:
        if side.layout == "diffusers":
            with torch.device("meta"):
                block = diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock(width, heads, size)
            _load(block, side.tensors(f"single_transformer_blocks.{i}."))
            return [torch.cat(block(image, text, condition, rope), 1)]
        weights = side.layer("single.", i) if side.layout == "orbax" else side.tensors(f"single_blocks.{i}.")
        return [reference.single_block(weights, side.layout, torch.cat([text, image], 1), condition, *rope, heads)]

    yield "embedders and final layer", lambda: _flux_ends(side, config)
    for i in range(config["num_layers"]):
        yield f"double block {i}", lambda i=i: double(i)
    for i in range(config["num_single_layers"]):
        yield f"single block {i}", lambda i=i: single(i)


def _flux_ends(side: _Side, config: dict[str, Any]) -> list[torch.Tensor]:
    tokens = _random(1, _IMAGE, config["in_channels"], seed=5)
    text = _random(1, _TEXT, config["joint_attention_dim"], seed=6)
    pooled = _random(1, config["pooled_projection_dim"], seed=7)
    sigma, guidance = torch.tensor([0.6]), torch.tensor([3.5])
    if side.layout == "diffusers":
        model = diffusers.FluxTransformer2DModel(**config | {"num_layers": 0, "num_single_layers": 0})
        outside = {
            name: value
            for prefix in ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")
            for name, value in side.tensors(prefix, strip=False).items()
        }
        _load(model, outside)
        ids = torch.zeros(_IMAGE, 3), torch.zeros(_TEXT, 3)
        out = model(
            hidden_states=tokens, encoder_hidden_states=text, pooled_projections=pooled, timestep=sigma,
            guidance=guidance if config["guidance_embeds"] else None, img_ids=ids[0], txt_ids=ids[1],
        ).sample  # fmt: skip
        return [out, model.context_embedder(text)]
    if side.layout == "orbax":
        names = ("image_embed", "text_embed", "time.", "guidance.", "pooled.", "out_modulation", "out.")
    else:
        names = ("img_in", "txt_in", "time_in", "guidance_in", "vector_in", "final_layer")
    weights = {name: value for prefix in names for name, value in side.tensors(prefix, strip=False).items()}
    features = {"time": _sinusoids(1000 * sigma)}
    if config["guidance_embeds"]:
        features["guidance"] = _sinusoids(1000 * guidance)
    return reference.flux_ends(weights, side.layout, tokens, text, pooled, features)


def _sinusoids(value: torch.Tensor) -> torch.Tensor:
    """FLUX.1's 256 features of sigma and guidance: cosines, then sines."""
    frequencies = torch.exp(-np.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = value[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


# -- the others ----------------------------------------------------------------------------------------------------


def _vae(side: _Side) -> Iterator[tuple[str, Callable[[], list[torch.Tensor]]]]:
    config = {**side.part.family.defaults, **side.part.config}
    image = _random(1, config["in_channels"], 16, 16, seed=1)
    latent = _random(1, config["latent_channels"], 4, 4, seed=2)
    if side.layout in ("orbax", "bfl"):
        model = reference.Autoencoder(side.tensors(), side.layout, config)
        yield "encoder", lambda: [model.encode(image)]
        yield "decoder", lambda: [model.decode(latent)]
        return
    ours = ("_class_name", "_diffusers_version", "_name_or_path", "torch_dtype")
    theirs = diffusers.AutoencoderKL(**{k: v for k, v in config.items() if k not in ours})
    state = side.tensors()
    for old, new in _OLD_ATTENTION.items():
        state = {name.replace(old, new) if "attentions" in name else name: value for name, value in state.items()}
    squeezed = {n: v[:, :, 0, 0] if "attentions" in n and v.ndim == 4 else v for n, v in state.items()}
    _load(theirs, squeezed)
    yield "encoder", lambda: [theirs.encode(image).latent_dist.parameters]
    yield "decoder", lambda: [theirs.decode(latent).sample]


def _clip(side: _Side) -> Iterator[tuple[str, Callable[[], list[torch.Tensor]]]]:
    config = side.part.config.get("text_config", side.part.config)
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    ids = torch.arange(min(8, config.get("max_position_embeddings", 77), config["vocab_size"]))[None]
    activation, epsilon = config.get("hidden_act", "quick_gelu"), config.get("layer_norm_eps", 1e-5)

    def layer(i: int) -> list[torch.Tensor]:
        if side.layout == "orbax":
            weights = {f"blocks.{name}": value for name, value in side.layer("blocks.", i).items()}
            weights |= {n: v for p in ("tokens", "positions", "norm") for n, v in side.tensors(f"{p}.", False).items()}
            return [reference.clip_layer(weights, ids, heads, activation, epsilon)]
        known = set(transformers.CLIPTextConfig().to_dict()) - {"model_type", "architectures", "dtype", "torch_dtype"}
        settings = {key: value for key, value in config.items() if key in known}
        settings |= {"num_hidden_layers": 1, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings))
        state = {f"encoder.layers.0.{n}": v for n, v in side.tensors(f"encoder.layers.{i}.").items()}
        state |= {n: v for p in ("embeddings.", "final_layer_norm.") for n, v in side.tensors(p, False).items()}
        if any(name.startswith("text_model.") for name in model.state_dict()):
            state = {f"text_model.{name}": value for name, value in state.items()}
        _load(model, state, "position_ids")
        return [model(ids).last_hidden_state]

    for i in range(layers):
        yield f"block {i}", lambda i=i: layer(i)


def _t5(side: _Side) -> Iterator[tuple[str, Callable[[], list[torch.Tensor]]]]:
    config = side.part.config
    buckets = config.get("relative_attention_num_buckets", 32)
    x = _random(1, max(2, min(8, buckets // 4)), config["d_model"], seed=1)
    epsilon = config.get("layer_norm_epsilon", 1e-6)

    def layer(i: int) -> list[torch.Tensor]:
        if side.layout == "orbax":
            weights = {f"blocks.{name}": value for name, value in side.layer("blocks.", i).items()}
            weights |= side.tensors("relative.", False) | side.tensors("norm.", False)
            return [reference.t5_layer(weights, x, config["num_heads"], epsilon)]
        model = transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=2, d_model=config["d_model"], d_kv=config["d_kv"], d_ff=config["d_ff"], num_layers=1,
                num_heads=config["num_heads"], relative_attention_num_buckets=buckets, layer_norm_epsilon=epsilon,
                feed_forward_proj="gated-gelu", dropout_rate=0.0,
            )
        )  # fmt: skip
        bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        state = {f"encoder.block.0.{n}": v for n, v in side.tensors(f"encoder.block.{i}.").items()}
        state |= side.tensors(bias, False) | side.tensors("encoder.final_layer_norm.", False)
        _load(model, state, "shared|embed_tokens")
        return [model(inputs_embeds=x).last_hidden_state]

    for i in range(config["num_layers"]):
        yield f"block {i}", lambda i=i: layer(i)


_BLOCKS = {"transformer": _flux, "vae": _vae, "text_encoder": _clip, "text_encoder_2": _t5}


def compare(source: Part, output: Part) -> dict[str, Any]:
    """Every block of a component in both checkpoints on the same random inputs.

    Returns:
        ``blocks`` compared, the ``largest`` relative difference, its ``bound``, and what ran each side.

    Raises:
        CheckpointError: a block's outputs differ: the key map of one of the layouts is wrong.
    """
    kinds = {output.source.storage(name) for name in output.source.keys()}  # noqa: SIM118
    rounded = next(iter(kinds)) if len(kinds) == 1 and is_float(next(iter(kinds))) else None
    blocks = _BLOCKS[source.family.name]
    largest, count, wrong = 0.0, 0, []
    with torch.no_grad():
        for (name, theirs), (_, ours) in zip(
            blocks(_Side(source, rounded)), blocks(_Side(output, rounded)), strict=True
        ):
            expected, got = theirs(), ours()
            difference = max(_difference(a, b) for a, b in zip(expected, got, strict=True))
            largest, count = max(largest, difference), count + 1
            if not difference <= BOUND:
                wrong.append(f"{name}: relative difference {difference:.2g}")
    if wrong:
        shown = "\n  ".join(wrong[:10]) + ("\n  ..." if len(wrong) > 10 else "")
        raise CheckpointError(
            f"{source.family.name}: {len(wrong)} of {count} blocks compute something else after the conversion from "
            f"{source.layout} to {output.layout} (bound {BOUND:g}):\n  {shown}"
        )
    return {"blocks": count, "largest": largest, "bound": BOUND, "layouts": [source.layout, output.layout]}


def _difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    if expected.shape != got.shape or not torch.isfinite(expected).all():
        return float("inf")
    scale = float(expected.abs().max())
    return float((expected - got).abs().max()) / scale if scale else float((got != 0).any())

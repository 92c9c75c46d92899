"""nano as a published pipeline: the diffusers folder layout with the published tensor names, weights in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from converters.keymap import Dims, Row, expand
from converters.keymaps import clip as clip_map
from converters.keymaps import flux as flux_map
from converters.keymaps import t5 as t5_map
from converters.keymaps import vae as vae_map
from sega_jax.models.abstract import parameters
from sega_jax.models.vae import VaeConfig
from sega_jax.nano import model as nano
from sega_jax.nano import vocabulary

_END, _PAD = 1, 0  # ids of </s> and <pad>


def published(module: nnx.Module, rows: Iterable[Row], dims: Dims) -> dict[str, np.ndarray]:
    """The tensors of ``module`` under their published names and layouts: the inverse of `weights.load`."""
    arrays = {path: np.asarray(jax.device_get(param[...])) for path, param in parameters(module).items()}
    tensors = {}
    for tensor in expand(list(rows), dims):
        parts = [arrays[slot.path] if slot.index is None else arrays[slot.path][slot.index] for slot in tensor.slots]
        tensors[tensor.source] = np.array(tensor.assemble(parts), order="C")
    return tensors


def vae_json(config: VaeConfig) -> dict:
    """``vae/config.json``."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_block_add_attention,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": nano.TRAINED[0] * nano.PIXELS_PER_TOKEN,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.use_post_quant_conv,
        "use_quant_conv": config.use_quant_conv,
    }


def clip_json() -> dict:
    """``text_encoder/config.json``."""
    config = nano.CLIP
    start = vocabulary.clip_tables(nano.WORDS)[0]["<|startoftext|>"]
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": start,
        "eos_token_id": config.eos_token_id,
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "clip_text_model",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "pad_token_id": config.eos_token_id,
        "projection_dim": config.hidden_size,
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
    }


def t5_json() -> dict:
    """``text_encoder_2/config.json``."""
    config = nano.T5
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "d_model": config.d_model,
        "decoder_start_token_id": _PAD,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.0,
        "eos_token_id": _END,
        "feed_forward_proj": config.feed_forward_proj,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "model_type": "t5",
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": _PAD,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "vocab_size": config.vocab_size,
    }


def scheduler_json() -> dict:
    """``scheduler/scheduler_config.json``: FLUX.1-dev's, with the anchors of nano's token counts."""
    (few, low), (many, high) = nano.SHIFT_ANCHORS
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": few,
        "base_shift": low,
        "max_image_seq_len": many,
        "max_shift": high,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    }


MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(modules: Mapping[str, nnx.Module], folder: Path) -> int:
    """Write the pipeline folder.

    Args:
        modules: ``transformer``, ``text_encoder``, ``text_encoder_2`` and ``vae`` (whose configuration carries the
            measured latent statistics).
        folder: created where missing; files of the same name are replaced.

    Returns:
        Bytes of all weights.
    """
    vae = vae_json(modules["vae"].config)
    transformer = nano.TRANSFORMER.to_dict()
    components = {
        "transformer": ("diffusion_pytorch_model", transformer, flux_map.DIFFUSERS, flux_map.dims(transformer)),
        "vae": ("diffusion_pytorch_model", vae, vae_map.rows(vae), vae_map.dims(vae)),
        "text_encoder": ("model", clip_json(), clip_map.ROWS, clip_map.dims(clip_json())),
        "text_encoder_2": ("model", t5_json(), t5_map.ROWS, t5_map.dims(t5_json())),
    }
    size = 0
    for name, (stem, config, rows, dims) in components.items():
        _json(folder / name / "config.json", config)
        tensors = published(modules[name], rows, dims)
        if name == "text_encoder_2":
            capitalised, lower = vocabulary.t5_aliases(nano.WORDS)
            tensors["shared.weight"][capitalised] = tensors["shared.weight"][lower]
        tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}
        path = folder / name / f"{stem}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        size += path.stat().st_size
    vocabulary.write_clip(folder / "tokenizer", nano.WORDS)
    vocabulary.write_t5(folder / "tokenizer_2", nano.WORDS)
    _json(folder / "scheduler" / "scheduler_config.json", scheduler_json())
    _json(folder / "model_index.json", MODEL_INDEX)
    return size

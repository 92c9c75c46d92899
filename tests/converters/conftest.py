"""Tiny checkpoints of every component, made with numpy alone."""

import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from converters.kinds import BY_NAME

CONFIGS = {
    "transformer": {
        "_class_name": "FluxTransformer2DModel", "in_channels": 16, "num_layers": 2, "num_single_layers": 3,
        "attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 24, "pooled_projection_dim": 20,
        "guidance_embeds": True, "axes_dims_rope": [4, 6, 6],
    },
    "vae": {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
        "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "use_quant_conv": False,
        "use_post_quant_conv": False, "mid_block_add_attention": True,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"], "vocab_size": 30, "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 1, "max_position_embeddings": 7,
    },
    "text_encoder_2": {
        "architectures": ["T5EncoderModel"], "vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 32,
        "num_layers": 2, "num_heads": 2,
    },
}  # fmt: skip


def state(name, layout="diffusers", dtype=ml_dtypes.bfloat16, seed=0):
    """Random tensors of a component by name, CLIP's with the prefix of published files."""
    rng = np.random.default_rng(seed)
    family = BY_NAME[name]
    tensors = family.tensors(CONFIGS[name], layout)
    return {family.prefix + t.source: rng.standard_normal(t.shape, np.float32).astype(dtype) for t in tensors}


def component(folder, name, tensors=None, **options):
    """A component folder as diffusers or transformers writes it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    file = folder / f"{BY_NAME[name].stem}.safetensors"
    save_file(state(name, **options) if tensors is None else tensors, file, metadata={"format": "pt"})
    return folder


def pipeline(folder, **options):
    """A pipeline folder: four components with weights and three without."""
    index = {"_class_name": "FluxPipeline", "_diffusers_version": "0.36.0"}
    for name, config in CONFIGS.items():
        component(folder / name, name, **options)
        index[name] = ["diffusers", config.get("_class_name") or config["architectures"][0]]
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
        (folder / name / "settings.json").write_text(json.dumps({"name": name}))
        index[name] = ["transformers", name.title()]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def read(*files):
    """All tensors of safetensors files by name, as (type, shape, bytes)."""
    found = {}
    for file in files:
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118
                array = handle.get_tensor(name)
                assert name not in found
                found[name] = (array.dtype.name, array.shape, array.tobytes())
    return found


@pytest.fixture
def tiny():
    """Builders and readers of tiny checkpoints."""
    return SimpleNamespace(CONFIGS=CONFIGS, state=state, component=component, pipeline=pipeline, read=read)

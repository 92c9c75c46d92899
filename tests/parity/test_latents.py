"""Latents files are exchanged with torch and diffusers in both directions."""

import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import numpy as np
from safetensors.torch import load_file, save_file

from sega_jax.media.latents import load_latents, save_latents


def test_torch_reads_ours(tmp_path):
    latents = np.random.default_rng(0).normal(size=(2, 6, 4, 16)).astype(np.float32)
    save_latents(tmp_path / "x.safetensors", latents, {"seed": 1})
    theirs = load_file(tmp_path / "x.safetensors")["latents"]
    assert theirs.dtype == torch.float32
    np.testing.assert_array_equal(theirs.permute(0, 2, 3, 1).numpy(), latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_read_diffusers_packed_latents(tmp_path, dtype):
    theirs = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = diffusers.FluxPipeline._pack_latents(theirs, 2, 16, 6, 4)
    save_file({"latents": packed.contiguous()}, tmp_path / "x.safetensors")
    ours, _ = load_latents(tmp_path / "x.safetensors", height=48, width=32)
    np.testing.assert_array_equal(ours, theirs.permute(0, 2, 3, 1).float().numpy())

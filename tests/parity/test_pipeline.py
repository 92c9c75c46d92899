"""The whole way: nano opened by diffusers' FluxPipeline and by sega_jax, same initial latents, float32."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import jax.numpy as jnp

import sega_jax as sj
from sega_jax.models.flux import PACKING
from sega_jax.weights.hub import resolve

pytestmark = pytest.mark.parity

PROMPTS = ["a red circle with stripes in the centre, blue background", "a green square on the left"]


@pytest.fixture(scope="module")
def theirs():
    pipe = diffusers.FluxPipeline.from_pretrained(resolve("nano"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours():
    return sj.Pipeline.from_pretrained("nano", dtype="float32")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(1 / np.mean(np.square(a - b))))


def test_the_seven_token_prompt_is_one(ours):
    tokens = ours.parts.tokenizers["t5"]
    lengths = [int((tokens([prompt]) != tokens.pad_id).sum()) for prompt in PROMPTS]
    assert 7 in lengths, f"T5 lengths {lengths}: keep a prompt of seven tokens among PROMPTS"


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("height", "width"), [(192, 192), (384, 288)], ids=["native", "2x"])
def test_pictures_match_diffusers(theirs, ours, prompt, height, width):
    noise = ours.noise(3, height, width)
    with torch.no_grad():
        expected = theirs(
            prompt,
            height=height,
            width=width,
            num_inference_steps=8,
            latents=torch.from_numpy(np.array(PACKING.pack(noise))),
            max_sequence_length=ours.parts.tokenizers["t5"].length,
            output_type="pt",
        ).images.numpy()
    made = ours.generate(
        prompt, height=height, width=width, steps=8, init_latents=np.asarray(noise), mu="native", positional="none",
        decode=False,
    )  # fmt: skip
    got = np.clip(ours.decode(made.latents) / 2 + 0.5, 0, 1).transpose(0, 3, 1, 2)
    value = psnr(got, expected)
    print(f"{prompt!r} {width}x{height}: {value:.1f} dB, contrast {expected.std():.3f}")
    assert expected.std() > 0.05, "a flat picture proves nothing"
    assert value >= 55


def test_true_guidance_matches_diffusers(theirs, ours):
    noise = ours.noise(4, 128, 192)
    with torch.no_grad():
        expected = theirs(
            PROMPTS[0],
            negative_prompt="",
            true_cfg_scale=3.0,
            height=128,
            width=192,
            num_inference_steps=4,
            latents=torch.from_numpy(np.array(PACKING.pack(noise))),
            max_sequence_length=ours.parts.tokenizers["t5"].length,
            output_type="latent",
        ).images.numpy()
    made = ours.generate(
        PROMPTS[0], negative_prompt="", true_guidance=3.0, height=128, width=192, steps=4,
        init_latents=np.asarray(noise), mu="native", positional="none", decode=False,
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(PACKING.pack(jnp.asarray(made.latents))), expected, atol=2e-3)

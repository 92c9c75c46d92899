"""``sega-release`` against the published way of computing it, written anew on PyTorch and put into diffusers' FLUX."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import jax.numpy as jnp

import sega_jax as sj
from sega_jax.models.flux import PACKING
from sega_jax.positional.spectrum import axis_bins, radial_bins
from sega_jax.weights.hub import resolve

pytestmark = pytest.mark.parity

EPS = 1e-8


def binned(power, place, bins):
    """Mean of the power per bin, with the release's guard against none."""
    index = (place * bins).long().clamp(max=bins - 1).flatten()
    total = torch.zeros(bins).index_add_(0, index, power.flatten())
    return total / (torch.bincount(index, minlength=bins) + EPS)


def axis_place(length):
    return torch.linspace(0, 1, length // 2 + 1)


def ring_place(height, width):
    rows, columns = torch.arange(height) - height / 2, torch.arange(width) - width / 2
    # rounded once, as on a GPU: the square root of some CPU builds is an ulp off here and there
    radius = (rows[:, None] ** 2 + columns**2).double().sqrt().float()
    return radius / (radius.max() + EPS)


class Sega(torch.nn.Module):
    """FLUX's position embedding with SEGA's; ``tokens`` are the embedded image tokens of this step."""

    def __init__(self, trained, axes=(16, 56, 56)):
        super().__init__()
        self.trained, self.axes, self.tokens = trained, axes, None

    def profiles(self, height, width):
        plane = self.tokens.reshape(-1, height, width, self.tokens.shape[-1]).float().mean((0, 3))
        plane = plane - plane.mean()
        rows = torch.fft.fft(plane, dim=0).abs().square().mean(1)[: height // 2 + 1]
        columns = torch.fft.fft(plane, dim=1).abs().square().mean(0)[: width // 2 + 1]
        whole = torch.fft.fftshift(torch.fft.fft2(plane)).abs().square()
        rings = binned(whole, ring_place(height, width), max(height, width) // 2).clamp(min=EPS)
        flat = (rings.log().mean().exp() / (rings.mean() + EPS)).clamp(0, 1)
        energies = [
            binned(power, axis_place(side), max(side // 2, 8)) for power, side in ((rows, height), (columns, width))
        ]
        return energies, 1 - float(flat) ** 1.5

    def magnitude(self, energy, reference, amplitude, pairs):
        logs = energy.clamp(min=EPS).log()
        place = (1 - torch.arange(pairs, dtype=torch.float64) / (pairs - 1)) * (len(logs) - 1)
        low = place.floor().long()
        share = place - low
        level = logs[low] * (1 - share) + logs[(low + 1).clamp(max=len(logs) - 1)] * share
        turned = torch.tanh(1.5 * (level - level.mean()) / level.std())
        return (reference * (1 - 0.15 * amplitude * (turned - turned.mean()))).clamp(min=1)

    def forward(self, ids):
        height, width = (int(ids[:, axis].max() - ids[:, axis].min()) + 1 for axis in (1, 2))
        scale = max(height, width) / self.trained
        factor = scale ** (2 * 56 / 54) / (1 + 0.1 * math.log(scale))
        energies, amplitude = self.profiles(height, width)
        angles, sizes = [], []
        for axis, dims in enumerate(self.axes):
            base = 10_000.0 * (factor if axis else 1.0)
            rate = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
            angles.append(ids[:, axis, None].double() * rate)
            pairs = dims // 2
            sizes.append(
                self.magnitude(energies[axis - 1], scale**0.08, amplitude, pairs) if axis else torch.ones(pairs)
            )
        angles, sizes = torch.cat(angles, 1), torch.cat([size.float() for size in sizes])
        return tuple((turn(angles).float() * sizes).repeat_interleave(2, 1) for turn in (torch.cos, torch.sin))


def test_bins_are_torch_s():
    for length in range(16, 513):
        index, bins = axis_bins(length, "float32")
        expected = (axis_place(length) * bins).long().clamp(max=bins - 1)
        np.testing.assert_array_equal(index, expected.numpy(), f"{length} tokens")
    for height, width in [(64, 64), (160, 160), (224, 224), (90, 160), (128, 256), (384, 128), (47, 33)]:
        ring, bins = radial_bins(height, width, "float32")
        np.testing.assert_array_equal(ring, (ring_place(height, width) * bins).long().clamp(max=bins - 1).numpy())


@pytest.fixture(scope="module")
def ours():
    return sj.Pipeline.from_pretrained("nano", dtype="float32")


@pytest.mark.parametrize(("height", "width"), [(384, 384), (480, 320), (576, 576)], ids=["2x", "2.5x", "3x"])
def test_release_of_nano(ours, height, width):
    """Latents after a run of four steps, to 120 dB of their range; the exact bins are far from that."""
    theirs = diffusers.FluxPipeline.from_pretrained(resolve("nano"), dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    embed = Sega(ours.parts.rope.trained[0])
    theirs.transformer.pos_embed = embed
    theirs.transformer.x_embedder.register_forward_hook(lambda *call: setattr(embed, "tokens", call[2]))
    noise = ours.noise(3, height, width)
    with torch.no_grad():
        expected = theirs(
            "a red circle with stripes in the centre, blue background",
            height=height,
            width=width,
            num_inference_steps=4,
            latents=torch.from_numpy(np.array(PACKING.pack(noise))),
            max_sequence_length=ours.parts.tokenizers["t5"].length,
            output_type="latent",
        ).images.numpy()

    def decibels(positional):
        made = ours.generate(
            "a red circle with stripes in the centre, blue background", height=height, width=width, steps=4,
            init_latents=np.asarray(noise), mu="native", positional=positional, decode=False,
        )  # fmt: skip
        error = np.asarray(PACKING.pack(jnp.asarray(made.latents))) - expected
        return 10 * np.log10(np.ptp(expected) ** 2 / np.mean(np.square(error)))

    released, exact = decibels("sega-release"), decibels("sega")
    print(f"{width}x{height}: sega-release {released:.1f} dB, exact bins {exact:.1f} dB")
    assert released >= 120
    assert exact < 100

"""Attention score against RoPE distance, per layer and head, of a model on one noisy picture."""

import argparse

import numpy as np

from sega_jax.evaluation import kappa
from sega_jax.pipeline.pipeline import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--prompt", default="a red circle with stripes in the centre, blue background")
    parser.add_argument("--side", type=int, help="pixels; default the trained side")
    parser.add_argument("--sigma", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=20, help="of the run that leads to the noise level")
    parser.add_argument("--axis", type=int, default=2, help="0 frame, 1 row, 2 column")
    parser.add_argument("--max-delta", type=int, default=32)
    parser.add_argument("--out", default="kappa.png", help="picture, or .npy for the numbers")
    options = parser.parse_args()

    pipe = Pipeline.from_pretrained(options.model)
    side = options.side or pipe.parts.rope.trained[0] * pipe.parts.rope.pixels_per_token
    clean = pipe.generate(options.prompt, width=side, height=side, steps=options.steps, decode=False).latents
    noisy = (1 - options.sigma) * clean + options.sigma * pipe.noise(1, side, side)
    layers = kappa.record(pipe.velocity(), pipe.params, noisy, options.sigma, pipe.encode([options.prompt]))
    values = kappa.curves(layers, pipe.parts.rope, options.axis, options.max_delta)
    if options.out.endswith(".npy"):
        np.save(options.out, values)
    else:
        kappa.plot(values, options.out, f"{options.model}, sigma {options.sigma:g}, axis {options.axis}")


if __name__ == "__main__":
    main()

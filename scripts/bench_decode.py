"""How far the tiled decode is from the exact one: PSNR over rendered scenes, by size of the picture.

    python scripts/bench_decode.py --sizes 1536 2048 --json benchmarks/decode-tiled.json

Scenes of nano's renderer are encoded, then decoded in strips (`--vae exact`) and in tiles (`--vae tiled`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import sega_jax as sj
from sega_jax.decoding.decode import TILE
from sega_jax.nano.grammar import sample
from sega_jax.nano.render import render
from sega_jax.runtime.provenance import provenance


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of pictures in [-1, 1]."""
    return float(-10.0 * np.log10(np.square(a.astype(np.float64) - b).mean() / 4.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1536, 2048], help="sides of the pictures in pixels")
    parser.add_argument("--scenes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    pipe = sj.Pipeline.from_pretrained(options.model, dtype="float32")
    rng, results = np.random.default_rng(0), []
    for side in options.sizes:
        for _ in range(options.scenes):
            picture = render(sample(rng), side, side, rng)[None].astype(np.float32) / 127.5 - 1.0
            latents = np.asarray(pipe.encode_image(picture))
            exact, tiled = (np.clip(pipe.decode(latents, vae=mode), -1.0, 1.0) for mode in ("exact", "tiled"))
            results.append({
                "side": side,
                "tiled_to_exact_dB": round(psnr(tiled, exact), 1),
                "largest_difference": round(float(np.abs(tiled - exact).max()), 3),
                "exact_to_picture_dB": round(psnr(exact, picture), 1),
                "tiled_to_picture_dB": round(psnr(tiled, picture), 1),
            })  # fmt: skip
            print(results[-1], flush=True)
    if options.json is not None:
        report = {
            "model": options.model,
            "tile": TILE,
            "range": [-1, 1],
            "results": results,
            **provenance(),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

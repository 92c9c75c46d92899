"""One denoising step with random weights: seconds, memory against the plan, share of a matrix product's rate, peer.

    python scripts/bench_step.py --model flux-dev --sizes 1024 2048 4096 6144
    python scripts/bench_step.py --model nano --sizes 192 384 768

No checkpoint is needed.  Each figure is of a process of its own: first one that compiles into a cache and is forgotten
(a GPU's compiler tries out kernels, which takes memory), then one that is measured, one that plans, and one that runs
diffusers' transformer of the same configuration, where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.attention.bench import matmul_rate
from sega_jax.costs.report import plan
from sega_jax.families.registry import skeleton
from sega_jax.models.abstract import Component
from sega_jax.pipeline.pipeline import Pipeline, default_dtype
from sega_jax.runtime.provenance import provenance, threads
from sega_jax.sampling.denoise import Conditioning

SPREAD = 0.02  # of random weights


def fastest(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of ``rounds`` runs after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def ours(options: argparse.Namespace) -> dict:
    parts = skeleton(options.model, options.dtype)
    config, side = parts.transformer_config, options.sizes[0]
    block = np.random.default_rng(0).normal(0, SPREAD, 2**20).astype(options.dtype)
    # made on the host, so that the device's peak is the step's
    params = jax.tree.map(lambda x: jax.device_put(np.resize(block, x.shape)), parts.transformer.params)
    parts = replace(parts, transformer=Component(parts.transformer.graphdef, params))
    pipe = Pipeline(parts, options.model, options.dtype, options.backend)
    latents = pipe.noise(0, side, side)
    text, pooled = np.resize(block, (1, parts.text_tokens, config.text_dim)), np.resize(block, (1, config.pooled_dim))
    scales = {"guidance": jnp.float32(3.5)} if config.guidance_embeds else {}
    asked = Conditioning({"text": jnp.asarray(text), "pooled": jnp.asarray(pooled)}, scales)
    velocity = pipe.velocity(options.positional)

    def run():
        return jax.block_until_ready(velocity.advance(pipe.params, latents, jnp.float32(0.5), asked))

    begun = time.perf_counter()
    run()
    first = time.perf_counter() - begun
    seconds = fastest(run, options.rounds)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    rate = matmul_rate(options.dtype)
    return {"dtype": options.dtype, "first": first, "seconds": seconds, "peak": peak, "matmul": rate}


def planned(options: argparse.Namespace) -> dict:
    side = options.sizes[0]
    report = plan(
        options.model, size=(side, side), target="local", positional=options.positional, dtype=options.dtype,
        backend=options.backend, mesh="context=1",
    )  # fmt: skip
    step = report["programs"][1]
    return {"flops": step["flops"], "peak": step["peak"]}


def theirs(options: argparse.Namespace) -> dict:
    try:
        import torch
        from diffusers import FluxTransformer2DModel
    except ImportError as error:
        return {"missing": str(error)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and jax.default_backend() != "cpu":
        return {"missing": "PyTorch sees no accelerator here"}
    torch.set_num_threads(threads())
    kind = getattr(torch, options.dtype)
    parts = skeleton(options.model, options.dtype)
    config, side = parts.transformer_config, options.sizes[0]
    settings = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**settings).to(kind)
    model = model.to_empty(device=device).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, SPREAD)
    rows = columns = side // parts.rope.pixels_per_token
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    arguments = {
        "hidden_states": torch.randn(1, rows * columns, config.in_channels, device=device, dtype=kind),
        "encoder_hidden_states": torch.randn(1, parts.text_tokens, config.text_dim, device=device, dtype=kind),
        "pooled_projections": torch.randn(1, config.pooled_dim, device=device, dtype=kind),
        "timestep": torch.full((1,), 0.5, device=device, dtype=kind),
        "guidance": torch.full((1,), 3.5, device=device) if config.guidance_embeds else None,
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(parts.text_tokens, 3, device=device),
    }

    def run():
        with torch.no_grad():
            model(**arguments)
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = fastest(run, options.rounds)
    return {"seconds": seconds, "peak": torch.cuda.max_memory_allocated() if device == "cuda" else None}


CHILDREN = {"ours": ours, "planned": planned, "theirs": theirs}


def child(name: str, side: int, options: argparse.Namespace, cache: str) -> dict:
    """What ``name`` of `CHILDREN` says in a process of its own; an ``error`` where it fails."""
    command = [sys.executable, __file__, "--child", name, "--sizes", str(side), "--model", options.model]
    command += ["--positional", options.positional, "--backend", options.backend, "--rounds", str(options.rounds)]
    command += ["--dtype", options.dtype] if options.dtype else []
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    if made.returncode:
        return {"error": (made.stderr.strip().splitlines() or [f"exit status {made.returncode}"])[-1]}
    return json.loads(made.stdout.splitlines()[-1])


def line(row: dict) -> str:
    """One size for the terminal."""
    mine, plans, peer = row["ours"], row["planned"], row["theirs"]
    what = f"{row['side']}²: "
    if problem := mine.get("error") or plans.get("error"):
        return what + problem
    rate = plans["flops"] / mine["seconds"]
    what += f"{mine['seconds']:.3f} s, {rate / 1e12:.2f} TFLOP/s, {rate / mine['matmul']:.2f} of a matrix product"
    what += f"; plan {plans['peak'] / 1e9:.2f} GB"
    if mine["peak"] is None:
        what += ", this backend does not report its own"
    else:
        what += f", measured {mine['peak'] / 1e9:.2f} GB ({mine['peak'] / plans['peak']:.2f} of it)"
    if "seconds" in peer:
        return what + f"; {peer['seconds'] / mine['seconds']:.2f}x the speed of diffusers"
    return what + f"; no diffusers: {peer.get('missing') or peer['error']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux-dev", help="flux-dev, flux-schnell, nano, a folder or a hub id")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 6144], help="sides in pixels")
    parser.add_argument("--positional", default="none")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default as of Pipeline")
    parser.add_argument("--backend", default="auto", help="attention kernel")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.dtype = options.dtype or default_dtype()  # only here: the parent leaves the device alone
        print(json.dumps(CHILDREN[options.child](options)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for side in options.sizes:
            compiled = child("ours", side, options, cache)
            row = {"side": side, "first": compiled.get("first"), "ours": compiled}
            if "error" not in compiled:
                row |= {"ours": child("ours", side, options, cache)}
            row |= {name: child(name, side, options, cache) for name in ("planned", "theirs")}
            rows.append(row)
            print(line(row), flush=True)
    if options.json is not None:
        shared = {name: getattr(options, name) for name in ("model", "positional", "backend", "rounds")}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**shared, "rows": rows, **provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Pinned latents: what nano's runs end with, for every layout and way of sampling, so that moving code proves itself.

The pins are results of this project's own code, so they say nothing about right or wrong (the golden vectors and the
parity suite do); they say that a change which should change nothing did not.  They hold to the bit on the kind of
processor that wrote them, and within `TOLERANCE` elsewhere, where sums are added in another order.

A change that is meant to change pictures writes them anew (all, or those that ``-k`` chooses), and its commit says so::

    SEGA_JAX_WRITE_PINS=1 python -m pytest -n 0 tests/test_pins.py -m "slow or not slow"
"""

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import sega_jax as sj
from sega_jax.runtime.provenance import processor, threads

PINS = Path(__file__).parent / "data" / "pins.npz"
TOLERANCE = 2e-3  # of latents whose standard deviation is about one, after two or three steps in float32
PROMPT = "a red circle with stripes in the centre, blue background"
WRITING = os.environ.get("SEGA_JAX_WRITE_PINS") == "1"

SIZES = {"wide": {"width": 256, "height": 128}, "tall": {"width": 256, "height": 384}}  # beyond 192
METHODS = ("none", "yarn", "dype-yarn", "sega")
LAYOUTS = {
    "dense": {"layout": "dense"},
    "crpa": {"layout": "crpa", "regions": "center:0.3"},
    "scalediff": {"layout": "scalediff"},
    "scale-dit": {"layout": "scale-dit"},
}
LADDER = {"wide": "128x64,256x128", "tall": "128x192,256x384"}
FAST = (  # one run of every way in the fast suite, the others in the slow one
    "dense/wide/none",
    "crpa/wide/dype-yarn",
    "scalediff/wide/sega",
    "image-to-image/wide",
    "guided/wide",
    "ladder/wide",
    "scale-dit-lora/wide",
)


def picture(size: str) -> np.ndarray:
    """A picture to start from, float32 [H, W, 3] in [-1, 1]: ramps in three directions."""
    y, x = np.mgrid[0 : SIZES[size]["height"], 0 : SIZES[size]["width"]].astype(np.float32)
    ramps = (x / x.max(), y / y.max(), (x + y) / (x + y).max())
    return 2.0 * np.stack(ramps, -1) - 1.0


def requests() -> dict[str, dict]:
    """Every pinned run: its name, and the arguments of `Pipeline.generate`."""
    cases = {}
    for size, sides in SIZES.items():
        for name, layout in LAYOUTS.items():
            for method in METHODS:
                case = {**sides, **layout, "positional": method, "steps": 3}
                if name == "scalediff":
                    case = {**layout, "ladder": LADDER[size], "positional": method, "steps": 3}
                cases[f"{name}/{size}/{method}"] = case
        ways = {
            "image-to-image": {**sides, "init_image": picture(size), "strength": 0.7, "steps": 3},
            "guided": {**sides, "negative_prompt": "a blue square", "true_guidance": 2.0, "steps": 2},
            "ladder": {"ladder": LADDER[size], "layout": "dense", "steps": 3},
            "scale-dit-lora": {**sides, "layout": "scale-dit", "steps": 3},
        }
        cases |= {f"{way}/{size}": {"positional": "sega", **options} for way, options in ways.items()}
    return cases


CASES = requests()


def lora(path: Path) -> Path:
    """A LoRA of the first double-stream block's queries and values, in PEFT's layout, always the same."""
    rng = np.random.default_rng(0)
    width = 128
    factors = {}
    for layer in ("to_q", "to_v"):
        name = f"transformer.transformer_blocks.0.attn.{layer}"
        factors[f"{name}.lora_A.weight"] = rng.standard_normal((4, width)).astype(np.float32) / 8
        factors[f"{name}.lora_B.weight"] = rng.standard_normal((width, 4)).astype(np.float32) / 8
    save_file(factors, path)
    return path


@pytest.fixture(scope="module")
def pipe():
    return sj.Pipeline.from_pretrained("nano", dtype="float32", backend="xla")


@pytest.fixture(scope="module")
def with_lora(pipe, tmp_path_factory):
    return pipe.with_guidance_lora(lora(tmp_path_factory.mktemp("lora") / "lora.safetensors"))


def write(latents: dict[str, np.ndarray]) -> None:
    """The pins with these runs in place of theirs."""
    arrays, digests = {}, {}
    if PINS.exists():
        with np.load(PINS) as file:
            arrays = {name: file[name] for name in file.files if name in CASES}
            digests = json.loads(str(file["record"]))["digests"]
    arrays |= {name: made.astype(np.float16) for name, made in latents.items()}
    digests |= {name: digest(made) for name, made in latents.items()}
    record = {"machine": machine(), "digests": {name: digests[name] for name in CASES if name in digests}}
    np.savez_compressed(PINS, record=np.asarray(json.dumps(record)), **{n: arrays[n] for n in CASES if n in arrays})


def digest(latents: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(latents).tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def pins():
    if WRITING:
        written = {}
        yield written
        write(written)
        return
    with np.load(PINS) as file:
        yield {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def digests(pins):
    """Of the pinned runs where this is the kind of machine that wrote them, else empty."""
    if WRITING:
        return {}
    record = json.loads(str(pins["record"]))
    return record["digests"] if record["machine"] == machine() else {}


def machine() -> list:
    return [processor(), threads(), jax.__version__]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_latents_are_as_pinned(name, pipe, with_lora, pins, digests):
    served = with_lora if name.startswith("scale-dit-lora") else pipe
    latents = served.generate(PROMPT, seed=5, decode=False, **CASES[name]).latents
    if WRITING:
        pins[name] = latents
        return
    np.testing.assert_allclose(latents, pins[name].astype(np.float32), rtol=2**-10, atol=TOLERANCE)
    if name in digests:
        assert digest(latents) == digests[name]


def test_every_run_is_pinned(pins):
    assert set(pins) == {*CASES, "record"} or WRITING

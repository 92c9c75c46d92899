"""Two processes with four fake devices each make the picture that one device makes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sega_jax as sj

OPTIONS = {"width": 80, "height": 48, "steps": 2, "positional": "sega", "seed": 4}
PROMPT = "a red circle"
CHILD = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
import sega_jax as sj
from sega_jax.sharding import make_mesh
assert jax.device_count() == 8 and jax.local_device_count() == 4
pipe = sj.Pipeline.from_pretrained("nano", dtype="float32", mesh=make_mesh(data=2, context=4, tensor=1))
held = sum(s.data.nbytes for x in jax.tree.leaves(pipe.params) for s in x.addressable_shards)
whole = sum(x.nbytes for x in jax.tree.leaves(pipe.params))
assert held < 0.55 * whole, (held, whole)
result = pipe.generate({prompt!r}, **{options!r})
np.savez(sys.argv[3], latents=result.latents, image=result.images[0].array)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    code = CHILD.format(prompt=PROMPT, options=OPTIONS)
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": root,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(rank), str(tmp_path / f"{rank}.npz")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            _, complaint = process.communicate(timeout=550)
            assert process.returncode == 0, complaint[-3000:]
    finally:
        for process in running:
            process.kill()
    expected = sj.Pipeline.from_pretrained("nano", dtype="float32").generate(PROMPT, **OPTIONS)
    for rank in range(2):
        got = np.load(tmp_path / f"{rank}.npz")
        np.testing.assert_allclose(got["latents"], expected.latents, atol=1e-4, rtol=0)
        assert np.abs(got["image"].astype(int) - expected.images[0].array.astype(int)).max() <= 1

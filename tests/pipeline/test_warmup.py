"""Compiling ahead of the weights: the run finds its program."""

import jax
import numpy as np
import pytest

import sega_jax as sj
from sega_jax import positional as pe
from sega_jax.pipeline import warmup
from sega_jax.sharding import make_mesh

PROMPT = "a red circle"


@pytest.mark.parametrize(("mesh", "negative"), [(None, "a square"), ({"context": 2}, None)])
def test_the_first_step_compiles_nothing(mesh, negative):
    mesh = mesh and make_mesh(jax.devices()[:2], **mesh)
    size = {"width": 272, "height": 32 if negative is None else 48, "steps": 1, "negative_prompt": negative}
    method = pe.get("ntk")
    outline = warmup.outline("nano", dtype="float32", hub={}, mesh=mesh)
    plan = outline.plan(PROMPT, positional=method, **size)
    lowered = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **kw: lowered.append((name, kw.get("fun_name")))
    )
    try:
        assert warmup.ahead(warmup.compile_step, outline, plan, method, batch=1).result() is True
        seen = [kind for kind, name in lowered if name == "predict"]
        assert seen
        lowered.clear()
        pipe = sj.Pipeline.from_pretrained("nano", dtype="float32", mesh=mesh)
        result = pipe.generate(PROMPT, positional=method, decode=False, **size)
        assert np.isfinite(result.latents).all()
        assert [kind for kind, name in lowered if name == "predict"] == []
    finally:
        jax.monitoring.clear_event_listeners()


def test_failures_are_left_to_the_run():
    assert warmup.ahead(lambda: 1 / 0).result() is None

"""The Hopper kernel without a GPU: its plan of work in NumPy, its arithmetic and its barriers in the interpreter."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from sega_jax.attention.kernels import Request, choose, hopper
from sega_jax.layouts.blocks import from_mask
from sega_jax.layouts.scale_dit import block_map
from tests.attention.test_kernels import Case, cases, check, compiled, oracle_gradients, over

interpreted = pytest.mark.skipif(
    jax.__version_info__ < hopper.OLDEST_JAX, reason="the Mosaic GPU interpreter needs jax >= 0.11 (Python >= 3.12)"
)
BLOCKS = ((128, 64), (128, 128), (256, 64), (128, 256))


def run(request: Request, programs: int = 3, races: bool = False):
    """More tiles than programs, so that tiles follow each other in one program, as on a GPU."""
    return hopper.run(request, interpret=plgpu.InterpretGPUParams(detect_races=races), programs=programs)


def drawn(case: Case) -> Case:
    return replace(case, width=case.depth, dtype="bfloat16")


def against_oracle(case: Case) -> None:
    request, visible = case.request()
    check(*compiled(run, request), request, visible)


SHAPES = cases(blocks=BLOCKS, longest=520, depths=hopper.HEAD_SIZES, widths=(64,), causal=False).map(drawn)


@interpreted
def test_forward():
    over(SHAPES, 6, against_oracle)


@interpreted
@pytest.mark.slow
def test_forward_on_sixty_shapes():
    over(SHAPES, 60, against_oracle)


EDGES = {
    "ragged, no map": Case(1, 200, 300, 3, 128, 128, "bfloat16", False, None, None, 1),
    "empty tiles between others": Case(2, 300, 500, 1, 64, 64, "bfloat16", True, (480, 0), None, 2),
    "one key": Case(1, 130, 1, 2, 64, 64, "bfloat16", True, None, None, 3),
    "map, lengths, large logits": Case(2, 400, 500, 1, 64, 64, "bfloat16", True, (480, 70), (128, 64), 4),
    "grouped keys under a map": Case(2, 300, 400, 2, 64, 64, "bfloat16", False, (400, 130), (128, 64), 6, group=3),
    "blocks of several tiles": Case(1, 600, 700, 1, 64, 64, "bfloat16", False, None, (256, 256), 5),
}


@interpreted
@pytest.mark.parametrize("name", EDGES)
def test_edges_without_races(name):
    """The simulator checks every access of shared memory against the barriers, and reports a barrier nobody meets."""
    request, visible = EDGES[name].request()
    check(*compiled(partial(run, programs=2, races=True), request), request, visible)


@interpreted
def test_traced_map_and_lengths():
    request, visible = Case(2, 260, 300, 1, 64, 64, "bfloat16", False, (300, 129), (128, 64), 6).request()

    def traced(q, k, v, length, blocks):
        return run(Request(q, k, v, request.scale, length, blocks))

    out, lse = jax.jit(traced)(request.q, request.k, request.v, request.kv_length, request.block_map)
    check(out, lse, request, visible)


@interpreted
def test_gradient():
    request, visible = Case(1, 130, 140, 1, 64, 64, "bfloat16", False, None, (128, 64), 7).request()
    rng = np.random.default_rng(0)
    cotangents = jnp.asarray(rng.standard_normal(request.q.shape), jnp.bfloat16), jnp.ones((1, 130, 1), jnp.float32)

    def pull(q, k, v):
        return jax.vjp(lambda *x: run(replace(request, q=x[0], k=x[1], v=x[2])), q, k, v)[1](cotangents)

    expected = oracle_gradients(request.q, request.k, request.v, request.scale, visible, *cotangents)
    for mine, right in zip(jax.jit(pull)(request.q, request.k, request.v), expected, strict=True):
        assert np.abs(np.asarray(mine).astype(np.float64) - right).max() <= 2e-2 * max(
            np.abs(x).max() for x in expected
        )


def planned(request: Request, programs: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """All rows of the plan that some program treats, and the tables beside it."""
    plan, own, *more = (np.asarray(x) for x in hopper._tables(request, programs))
    rows = [plan[p, : own[p]] for p in range(len(plan))]
    return rows, more


def shapes(batch: int, tokens: int, heads: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, tokens, heads, 128), jnp.bfloat16)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("batch", "heads", "programs"), [(1, 3, 7), (2, 1, 4), (1, 1, 100)])
def test_plan_visits_exactly_the_map(traced, batch, heads, programs):
    """Every tile once; the blocks it lists, and the bits that mask them, are the map's."""
    rng = np.random.default_rng(8)
    queries, keys = 700, 600
    request, visible = Case(batch, queries, keys, heads, 64, 64, "bfloat16", False, None, (256, 128), 9).request()
    lengths = jnp.asarray(rng.integers(1, keys, batch), jnp.int32) if traced else None
    request = replace(request, kv_length=lengths)
    if traced:
        tables = jax.jit(lambda m, n: hopper._tables(replace(request, block_map=m, kv_length=n), programs))
        plan, own, visits, bits = (np.asarray(x) for x in tables(request.block_map, lengths))
    else:
        plan, own, visits, bits = (np.asarray(x) for x in hopper._tables(request, programs))
    seen = np.zeros((batch * heads, 6 * 128, 5 * 128), bool)
    done = []
    for p in range(len(plan)):
        for plane, tile, whole, total, end in plan[p, : own[p]]:
            done.append((plane, tile))
            table = plane // heads if len(visits) > 1 else 0
            for j, word in enumerate(visits[table, tile // 2, :total]):
                column, code = word >> hopper.CODE, word & (2**hopper.CODE - 1)
                masks = bits[code][:, (tile % 2) * 128 :][:, :128].view(np.uint32)  # [keys / 32, 128]
                mask = (masks[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None] & 1).reshape(128, 128).T > 0
                mask = mask & (column * 128 + np.arange(128) < end)[None, :]
                assert mask.any() or j >= whole
                assert mask.all() or j >= whole
                seen[plane, tile * 128 : (tile + 1) * 128, column * 128 : (column + 1) * 128] |= mask
    assert sorted(done) == [(plane, tile) for plane in range(batch * heads) for tile in range(6)]
    if traced:
        visible = visible & (np.arange(keys) < np.asarray(lengths)[:, None])[:, None, None, :]
    expected = np.broadcast_to(visible, (batch, heads, queries, keys)).reshape(-1, queries, keys)
    np.testing.assert_array_equal(seen[:, :queries, :keys], expected)


@pytest.mark.parametrize(("side", "mask", "heads"), [(256, "kernel", 24), (256, "paper", 24), (128, "kernel", 8)])
def test_programs_finish_together(side, mask, heads):
    """Text rows are 37 times as long as the others; the busiest program has at most 4 % above the mean."""
    blocks = block_map(side, side, 512, mask)
    x = shapes(1, 512 + side**2 + side**2 // 16, heads)
    rows, _ = planned(Request(x, x, x, 1.0, None, blocks), hopper.PROGRAMS)
    work = np.array([(r[:, 3] + 1).sum() for r in rows])
    assert np.concatenate(rows)[:, 3].sum() == blocks.visited * heads
    assert work.max() <= 1.04 * work.mean()


def on_gpu(monkeypatch, capability: str) -> None:
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    device = SimpleNamespace(compute_capability=capability, client=client)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])


@interpreted
def test_auto_takes_it_for_block_maps_only(monkeypatch):
    on_gpu(monkeypatch, "9.0")
    x = shapes(1, 256, 2)
    blocks = from_mask(np.ones((256, 256), bool), 128, 128)
    assert choose(Request(x, x, x, 1.0))[0].name == "cudnn"
    assert choose(Request(x, x, x, 1.0, None, blocks))[0].name == "hopper"


@pytest.mark.parametrize(
    ("capability", "changes", "reason"),
    [
        ("8.0", {}, "compute capability 9.0.*this device has 8.0"),
        ("9.0", {"block": (64, 64)}, "multiples of 128 and key blocks of 64, got 64 and 64"),
        ("9.0", {"dtype": "float32"}, "bfloat16, got float32"),
        ("9.0", {"depth": 96}, r"one head size of \(64, 128\), got 96"),
        ("9.0", {"scale": -1.0}, "positive scales"),
    ],
)
@interpreted
def test_refusals(monkeypatch, capability, changes, reason):
    on_gpu(monkeypatch, capability)
    x = jax.ShapeDtypeStruct((1, 256, 2, changes.get("depth", 128)), changes.get("dtype", "bfloat16"))
    block = changes.get("block", (128, 128))
    blocks = from_mask(np.ones((256, 256), bool), *block)
    with pytest.raises(ValueError, match=f"'hopper' cannot serve this request.*{reason}"):
        choose(Request(x, x, x, changes.get("scale", 1.0), None, blocks), "hopper")


@pytest.mark.skipif(jax.__version_info__ >= hopper.OLDEST_JAX, reason="this jax is new enough")
def test_refuses_an_old_jax(monkeypatch):
    on_gpu(monkeypatch, "9.0")
    x = shapes(1, 256, 2)
    with pytest.raises(ValueError, match=r"needs jax 0\.11 or newer"):
        choose(Request(x, x, x, 1.0), "hopper")

"""Grouped keys and causal attention: every kernel serves them as float64 does, or refuses them by name."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.attention import attention
from sega_jax.attention.kernels import (
    Request,
    choose,
    chunks,
    cudnn,
    explain,
    hopper,
    reference,
    registered,
    splash,
    tpu,
    xla,
)
from sega_jax.attention.kernels.contract import causal_pairs, cost
from sega_jax.attention.kernels.cpu import cpu
from sega_jax.layouts.blocks import from_mask
from sega_jax.training import fast_products
from tests.attention.test_kernels import (
    SMALL,
    SMALL_TOGETHER,
    Case,
    check,
    compiled,
    oracle,
    oracle_gradients,
    skip_without_compiler,
)

GROUPED = Case(2, 150, 200, 2, 64, 64, "float32", False, (200, 31), None, 1, group=3)
CAUSAL = replace(GROUPED, causal=True)
CASES = {
    "grouped": GROUPED,
    "grouped, map": replace(GROUPED, block=(16, 8)),
    "causal": replace(CAUSAL, group=1),
    "causal, grouped, bfloat16": replace(CAUSAL, dtype="bfloat16", group=4, lengths=None),
    "causal, more queries than keys": replace(CAUSAL, queries=200, keys=90, lengths=(90, 0)),
    "causal, large logits": replace(CAUSAL, large=True),
}
RUNS = {
    "reference": reference.run,
    "cpu": cpu.run,
    "xla": xla.run,
    "xla in small chunks": lambda request: xla.run(request, SMALL),
    "xla, all heads together": lambda request: xla.run(request, SMALL_TOGETHER),
    "tpu, interpreted": partial(tpu.run, interpret=True, tile=(32, 48)),
    "splash, interpreted": partial(splash.run, interpret=True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RUNS)
def test_every_kernel_that_runs_here(name, case, monkeypatch):
    monkeypatch.setattr(chunks, "ALIGN", 8)
    if name == "cpu":
        skip_without_compiler()
    if name.startswith("splash") and "map" in case:
        pytest.skip("it refuses maps")
    request, visible = CASES[case].request()
    check(*compiled(RUNS[name], request), request, visible)


@pytest.mark.parametrize("case", ["grouped, map", "causal, more queries than keys", "causal, grouped, bfloat16"])
@pytest.mark.parametrize("name", ["xla in small chunks", "xla, all heads together", "cpu"])
def test_gradients(name, case, monkeypatch):
    """Of grouped keys they add up over the queries' heads; through out and lse."""
    monkeypatch.setattr(chunks, "ALIGN", 8)
    if name == "cpu":
        skip_without_compiler()
    request, visible = CASES[case].request()
    rng = np.random.default_rng(2)
    d_out = jnp.asarray(rng.standard_normal(request.q.shape), request.q.dtype)
    d_lse = jnp.asarray(rng.standard_normal(request.q.shape[:3]), jnp.float32)

    def pull(q, k, v):
        return jax.vjp(lambda *x: RUNS[name](replace(request, q=x[0], k=x[1], v=x[2])), q, k, v)[1]((d_out, d_lse))

    got = jax.jit(pull)(request.q, request.k, request.v)
    expected = oracle_gradients(request.q, request.k, request.v, request.scale, visible, d_out, d_lse)
    bound = {"float32": 2e-5, "bfloat16": 2e-2}[request.q.dtype.name] * max(np.abs(x).max() for x in expected)
    for mine, right in zip(got, expected, strict=True):
        assert mine.shape == right.shape
        assert np.abs(np.asarray(mine).astype(np.float64) - right).max() <= bound


@pytest.mark.parametrize("plan", [chunks.CPU, chunks.OTHER], ids=["separate", "together"])
@pytest.mark.parametrize("backward", [False, True])
def test_keys_are_not_repeated(plan, backward):
    """Compiled temporaries of 16 query heads on one key head stay below a sixteenth of what repeated keys take,
    beside what the queries' side and the scores in flight need: no [N, N], and nothing that grows with the group."""

    def temporary(queries, keys, heads):
        def loss(q, k, v):
            out, lse = xla.run(Request(q, k, v, 0.1, causal=queries == keys), small)
            return out.astype(jnp.float32).sum() + lse.sum()

        q, k = (jax.ShapeDtypeStruct((1, *shape, 64), jnp.bfloat16) for shape in ((queries, heads), (keys, 1)))
        run = jax.jit(jax.grad(loss, (1, 2)) if backward else loss)
        return run.lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    small = replace(plan, scores=256 * 512, keys=512)
    keys, heads = 16_384, 16
    repeated = heads * keys * 64 * 2 * 2  # bfloat16 k and v
    assert temporary(64, keys, heads) < repeated / 2
    assert temporary(8_192, 8_192, 2) < 8_192**2


def test_auto_serves_both_and_explains():
    x = jax.ShapeDtypeStruct((1, 64, 8, 64), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.float32)
    request = Request(x, k, k, 1.0, causal=True)
    assert (request.kv_heads, request.group) == (2, 4)
    assert choose(request)[0].name in ("cpu", "xla")
    assert "xla: refused" not in explain(request)


def test_plain_attention_takes_both():
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 20, heads, 8)), jnp.float32) for heads in (6, 2, 2))
    out = attention(q, k, v, causal=True)
    expected, _ = oracle(q, k, v, 8**-0.5, np.tril(np.ones((20, 20), bool))[None, None])
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_cudnn_is_asked_for_a_causal_mask(monkeypatch):
    """No GPU: float64 NumPy stands in, by the mask it is asked for."""
    kinds = cudnn.fused.MaskType
    for lengths, kind in ((None, kinds.CAUSAL), ((16, 0), kinds.PADDING_CAUSAL)):
        case = Case(2, 24, 16, 2, 32, 32, "bfloat16", False, lengths, None, 10, group=3, causal=True)
        request, visible = case.request()

        def stand_in(q, k, v, *, scale, return_residual, mask_type, q_seqlen=None, kv_seqlen=None, kind=kind):
            assert mask_type is kind
            assert k.shape[2] == 2
            seen = np.broadcast_to(np.arange(16) <= np.arange(24)[:, None], (2, 1, 24, 16))
            if kv_seqlen is not None:
                seen = seen & (np.arange(16) < np.asarray(kv_seqlen)[:, None])[:, None, None, :]
            out, lse = oracle(q, k, v, scale, seen)
            return jnp.asarray(out, q.dtype), jnp.asarray(lse.transpose(0, 2, 1), jnp.float32)

        monkeypatch.setattr(cudnn.fused, "dot_product_attention", stand_in)
        check(*cudnn._forward(request), request, visible)


def test_refusals_name_what_is_missing():
    x, k = (jnp.zeros((1, 128, heads, 64), jnp.bfloat16) for heads in (4, 2))
    f = [y.astype(jnp.float32) for y in (x, k)]
    training = registered()[fast_products.BACKEND]
    assert "no grouped keys" in training.supports(Request(f[0], f[1], f[1], 1.0)).reason
    assert "no causal attention" in training.supports(Request(f[0], f[0], f[0], 1.0, causal=True)).reason
    if jax.__version_info__ >= hopper.OLDEST_JAX:
        assert "no causal attention" in hopper._shape_refusal(Request(x, k, k, 1.0, causal=True)).reason
        assert hopper._shape_refusal(Request(x, k, k, 1.0)) is None


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 8, 4, 8), (1, 8, 3, 8), (1, 8, 3, 8)),  # 3 does not divide 4
        ((1, 8, 2, 8), (1, 8, 4, 8), (1, 8, 4, 8)),  # more key heads than query heads
        ((1, 8, 4, 8), (1, 8, 4, 8), (1, 8, 2, 8)),  # values of other heads
        ((1, 8, 4, 8), (1, 8, 4, 4), (1, 8, 4, 8)),  # another head size
        ((1, 8, 4, 8), (2, 8, 4, 8), (2, 8, 4, 8)),  # another batch
    ],
)
def test_shapes_that_do_not_belong_together(q, k, v):
    with pytest.raises(ValueError, match=f"attention of q {re.escape(str(q))}"):
        Request(*map(jnp.zeros, (q, k, v)), 1.0)


def test_a_map_draws_its_own_diagonal():
    x = jnp.zeros((1, 16, 1, 8))
    with pytest.raises(ValueError, match="draw what a query may not see in the map's patterns"):
        Request(x, x, x, 1.0, None, from_mask(np.ones((16, 16), bool), 8, 8), causal=True)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (3, 9), (9, 3), (2_500, 2_048)])
def test_costs(queries, keys):
    """Pairs against a mask counted, keys and values once per key head and query tile, up to the diagonal."""
    q = jax.ShapeDtypeStruct((2, queries, 6, 16), jnp.bfloat16)
    k, v = (jax.ShapeDtypeStruct((2, keys, 3, width), jnp.bfloat16) for width in (16, 24))
    seen = int(np.tril(np.ones((queries, keys), bool)).sum())
    assert causal_pairs(queries, keys) == seen
    whole, half = cost(Request(q, k, v, 1.0)), cost(Request(q, k, v, 1.0, causal=True))
    assert whole.flops == 2 * 2 * 6 * queries * keys * 40
    assert half.flops == 2 * 2 * 6 * seen * 40
    own = 2 * 6 * queries * (2 * 40 + 4)
    assert whole.bytes == own + 2 * 3 * 2 * -(-queries // 1_024) * keys * 40
    read = sum(min(queries, start + 1_024, keys) for start in range(0, queries, 1_024))
    assert half.bytes == own + 2 * 3 * 2 * read * 40

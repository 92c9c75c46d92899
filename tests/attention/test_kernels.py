"""One suite for every attention kernel: float64 NumPy is the judge, shapes are drawn."""

import itertools
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from sega_jax.attention import merge
from sega_jax.attention.kernels import (
    Kernel,
    Refusal,
    Request,
    choose,
    chunks,
    contract,
    cudnn,
    explain,
    reference,
    register,
    registered,
    splash,
    tokamax,
    tpu,
    xla,
)
from sega_jax.attention.kernels.cpu import cpu, toolchain
from sega_jax.layouts.blocks import from_blocks, from_mask

BOUND = {"float32": 1e-5, "bfloat16": 1e-2}


def oracle(q, k, v, scale, visible):
    """Arrays [B, N, H, D], visible bool [B, 1, Nq, Nk] -> out, lse [B, Nq, H], all float64; keys may be grouped."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    k, v = (x.repeat(q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = np.where(visible, scores, -np.inf)
    highest = scores.max(-1, keepdims=True)
    highest = np.where(np.isneginf(highest), 0.0, highest)
    weights = np.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1.0, total)
    with np.errstate(divide="ignore"):
        lse = (highest + np.log(total))[..., 0].transpose(0, 2, 1)
    return np.einsum("bhqk,bkhd->bqhd", weights, v), lse


def oracle_gradients(q, k, v, scale, visible, d_out, d_lse):
    """Cotangents of q, k, v of `oracle`, by the softmax's own derivative, in float64."""
    q, k, v, d_out, d_lse = (np.asarray(x).astype(np.float64) for x in (q, k, v, d_out, d_lse))
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat(group, axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = np.where(visible, scores, -np.inf)
    highest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(highest), 0.0, highest))
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1.0, total)
    dv = np.einsum("bhqk,bqhd->bkhd", weights, d_out)
    slope = np.einsum("bqhd,bkhd->bhqk", d_out, v)
    slope = weights * (slope - (weights * slope).sum(-1, keepdims=True) + d_lse.transpose(0, 2, 1)[..., None]) * scale
    dk = np.einsum("bhqk,bqhd->bkhd", slope, q)
    dk, dv = (x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3) for x in (dk, dv))
    return np.einsum("bhqk,bkhd->bqhd", slope, k), dk, dv


@dataclass(frozen=True)
class Case:
    """A drawn request; the same numbers for every kernel.  ``group`` query heads share each of the ``heads``."""

    batch: int
    queries: int
    keys: int
    heads: int
    depth: int
    width: int
    dtype: str
    large: bool
    lengths: tuple[int, ...] | None
    block: tuple[int, int] | None
    seed: int
    group: int = 1
    causal: bool = False

    def request(self) -> tuple[Request, np.ndarray]:
        """The request and its visibility, bool [B, 1, Nq, Nk]."""
        rng = np.random.default_rng(self.seed)
        asking = self.queries, self.group * self.heads, self.depth
        shapes = asking, (self.keys, self.heads, self.depth), (self.keys, self.heads, self.width)
        q, k, v = (rng.standard_normal((self.batch, *shape)) for shape in shapes)
        scale = self.depth**-0.5
        if self.large:  # logits of some thousands that float32 holds exactly
            q, k, scale = np.round(2 * q), np.round(2 * k), 64.0
        visible = np.ones((self.batch, 1, self.queries, self.keys), bool)
        length = None
        if self.lengths is not None:
            length = jnp.asarray(self.lengths, jnp.int32)
            visible &= (np.arange(self.keys) < np.array(self.lengths)[:, None])[:, None, None, :]
        blocks = None
        if self.block is not None:
            mask = self.mask(rng)
            blocks = from_mask(mask, *self.block)
            visible &= mask
        if self.causal:
            visible &= np.arange(self.keys) <= np.arange(self.queries)[:, None]
        arrays = (jnp.asarray(x, jnp.dtype(self.dtype)) for x in (q, k, v))
        return Request(*arrays, scale, length, blocks, self.causal), visible

    def mask(self, rng) -> np.ndarray:
        """Blocks that are whole, empty or partial; some query blocks see nothing."""
        rows, columns = (-(-n // b) for n, b in zip((self.queries, self.keys), self.block, strict=True))
        kind = rng.integers(0, 3, (rows, columns))
        kind[rng.random(rows) < 0.2] = 0
        bits = rng.random((2, *self.block)) < 0.5
        blocks = np.where(
            (kind == 1)[:, :, None, None], True, (kind == 2)[:, :, None, None] & bits[rng.integers(0, 2, kind.shape)]
        )
        full = blocks.transpose(0, 2, 1, 3).reshape(rows * self.block[0], columns * self.block[1])
        return full[: self.queries, : self.keys]


def cases(
    blocks=((8, 8), (16, 8), (8, 32)), longest=150, depths=(4, 8, 24), widths=(8, 24), batches=(1, 2), causal=True
):
    """Strategy over `Case`: ragged lengths, single keys, empty rows, partial blocks, grouped keys, large logits.

    Of the dense ones, half are causal where ``causal`` allows.
    """

    @st.composite
    def draw(pick):
        batch = pick(st.sampled_from(batches))
        queries = pick(st.integers(1, longest))
        keys = pick(st.one_of(st.just(1), st.integers(1, longest), st.integers(1, longest)))
        depth = pick(st.sampled_from(depths))
        lengths = pick(st.none() | st.tuples(*(st.integers(0, keys) for _ in range(batch))))
        block = pick(st.none() | st.sampled_from(blocks))
        heads, group = pick(st.sampled_from(((1, 1), (3, 1), (1, 4), (2, 2), (2, 3))))
        return Case(
            batch=batch,
            queries=queries,
            keys=keys,
            heads=heads,
            depth=depth,
            width=pick(st.sampled_from(widths)),
            dtype=pick(st.sampled_from(("float32", "bfloat16"))),
            large=pick(st.booleans()),
            lengths=lengths,
            block=block,
            seed=pick(st.integers(0, 2**31)),
            group=group,
            causal=causal and block is None and pick(st.booleans()),
        )

    return draw()


def check(out, lse, request: Request, visible) -> None:
    """Errors relative to the largest value; rows without keys are 0 and -inf."""
    bound = BOUND[request.q.dtype.name]
    expected, expected_lse = oracle(request.q, request.k, request.v, request.scale, visible)
    assert out.shape == expected.shape
    assert out.dtype == request.q.dtype
    assert lse.dtype == jnp.float32
    out, lse = np.asarray(out).astype(np.float64), np.asarray(lse).astype(np.float64)
    empty = np.isneginf(expected_lse)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert np.all(out[empty] == 0)
    assert np.abs(out - expected).max() <= bound * np.abs(expected).max()
    lse, expected_lse = (np.where(empty, 0.0, x) for x in (lse, expected_lse))
    assert np.abs(lse - expected_lse).max() <= bound * max(1.0, np.abs(expected_lse).max())


SMALL = replace(chunks.CPU, scores=32 * 48, keys=48, fetch=24)  # several chunks of queries and keys at these sizes
SMALL_TOGETHER = replace(chunks.OTHER, scores=6 * 32 * 48, keys=48, fetch=16)
CPU_SHAPES = {"depths": (4, 7, 24, 128), "widths": (5, 8, 40)}
RUNS = {  # kernels and how many shapes to draw; compiling an interpreted kernel takes seconds, see the slow test
    "reference": (reference.run, 10, {}),
    "cpu": (cpu.run, 30, CPU_SHAPES),
    "cpu in several chunks": (cpu.run, 30, {**CPU_SHAPES, "longest": 900, "blocks": ((8, 8), (40, 300), (300, 24))}),
    "xla": (xla.run, 15, {}),
    "xla in small chunks": (lambda request: xla.run(request, SMALL), 30, {}),
    "xla, all heads together": (lambda request: xla.run(request, SMALL_TOGETHER), 15, {}),
    "tpu, interpreted": (
        lambda request: tpu.run(request, interpret=True, tile=(32, 48)),
        8,
        {"depths": (64, 128), "widths": (64, 128)},
    ),
}


def compiled(run, request: Request):
    return jax.jit(lambda q, k, v: run(replace(request, q=q, k=k, v=v)))(request.q, request.k, request.v)


def over(strategy, draws: int, body) -> None:
    """Run ``body`` on that many draws, the same ones every time."""
    seen = []

    @settings(
        max_examples=draws, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def drawn(case):
        seen.append(case)
        body(case)

    drawn()
    assert len(seen) >= draws


def skip_without_compiler() -> None:
    """Skips where there is no C++ compiler; one that cannot compile the CPU's kernel is a failure."""
    try:
        toolchain.compiler()
    except toolchain.ToolchainError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", RUNS)
def test_forward(name, monkeypatch):
    monkeypatch.setattr(chunks, "ALIGN", 8)
    run, draws, shapes = RUNS[name]
    if name.startswith("cpu"):
        skip_without_compiler()

    def body(case):
        request, visible = case.request()
        check(*compiled(run, request), request, visible)

    over(cases(**shapes), draws, body)


@pytest.mark.slow
def test_forward_of_the_tpu_kernel_on_sixty_shapes():
    run, _, shapes = RUNS["tpu, interpreted"]

    def body(case):
        request, visible = case.request()
        check(*compiled(run, request), request, visible)

    over(cases(**shapes), 60, body)


@pytest.mark.parametrize("plan", [SMALL, SMALL_TOGETHER], ids=["separate", "together"])
def test_gradients(plan, monkeypatch):
    """Cotangents through out and lse, against float64; a query without keys passes none on."""
    monkeypatch.setattr(chunks, "ALIGN", 8)

    def body(case):
        request, visible = case.request()
        rng = np.random.default_rng(case.seed + 1)
        d_out = jnp.asarray(rng.standard_normal((*request.q.shape[:3], case.width)), request.q.dtype)
        d_lse = jnp.asarray(rng.standard_normal(request.q.shape[:3]), jnp.float32)

        def pull(q, k, v):
            _, back = jax.vjp(lambda *x: xla.run(replace(request, q=x[0], k=x[1], v=x[2]), plan), q, k, v)
            return back((d_out, d_lse))

        got = jax.jit(pull)(request.q, request.k, request.v)
        expected = oracle_gradients(request.q, request.k, request.v, request.scale, visible, d_out, d_lse)
        for mine, right in zip(got, expected, strict=True):
            assert mine.dtype == request.q.dtype
            bound = BOUND[case.dtype] * max(np.abs(x).max() for x in expected)
            assert np.abs(np.asarray(mine).astype(np.float64) - right).max() <= 2 * bound

    over(cases(longest=70).filter(lambda case: not case.large), 8, body)


@pytest.mark.parametrize("name", ["reference", "xla", "auto"])
def test_merge_of_splits(name):
    """Attention over any split of the keys, merged, is attention over all of them; so are its gradients."""

    def run(request):
        return choose(request, name)[0].run(request)

    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 2, 8)), jnp.float32) for n in (30, 50, 50))
    visible = np.ones((2, 1, 30, 50), bool)
    visible[0, :, :, 20:] = False
    for cuts in ((0, 17, 50), (0, 1, 2, 49, 50)):

        def whole(q, k, v, cuts=cuts):
            parts = []
            for a, b in itertools.pairwise(cuts):
                length = jnp.clip(jnp.array([20, 50]) - a, 0, b - a).astype(jnp.int32)
                parts.append(run(Request(q, k[:, a:b], v[:, a:b], 0.3, length)))
            result = parts[0]
            for part in parts[1:]:
                result = merge(result, part)
            return result

        out, lse = jax.jit(whole)(q, k, v)
        check(out, lse, Request(q, k, v, 0.3), visible)
    cotangents = np.ones(out.shape), np.ones(lse.shape)
    expected = oracle_gradients(q, k, v, 0.3, visible, *cotangents)
    got = jax.jit(lambda *x: jax.vjp(whole, *x)[1](tuple(jnp.asarray(c, jnp.float32) for c in cotangents)))(q, k, v)
    for mine, right in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, right, atol=1e-5 * np.abs(right).max())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("block", [None, 512])
def test_memory_is_linear(backward, block):
    """Compiled temporary memory grows with N, not with N^2, and stays below a byte per pair.

    Its growth is compared with chunks of one size at every length, so that what is in flight is the same constant in
    each; with the chunks a run takes it grows no faster than N.
    """

    def temporary(n, plan):
        blocks = None
        if block:
            band = np.abs(np.subtract.outer(np.arange(n // block), np.arange(n // block))) <= 1
            blocks = from_blocks(np.where(band, 0, -1), np.zeros((0, block, block), bool), block, block)

        def forward(q, k, v):
            return xla.run(Request(q, k, v, 0.1, None, blocks), plan)

        def loss(*x):
            out, lse = forward(*x)
            return out.astype(jnp.float32).sum() + lse.sum()

        x = jax.ShapeDtypeStruct((1, n, 2, 32), jnp.bfloat16)
        run = jax.jit(jax.grad(loss, (0, 1, 2)) if backward else forward)
        return run.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    plan = replace(chunks.CPU, scores=512 * 1_024, keys=1_024)
    four, eight, sixteen = (temporary(n, plan) for n in (4_096, 8_192, 16_384))
    assert sixteen < 16_384**2
    assert sixteen - eight <= 2.2 * max(eight - four, 4_096 * 2 * 32 * 4)
    four, sixteen = (temporary(n, None) for n in (4_096, 16_384))
    assert sixteen < min(16_384**2, 4 * four)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tpu_kernel_in_the_simulator(dtype, traced):
    """The simulator fills what was never written with NaN, checks bounds and races; batch, lengths and patterns."""
    case = Case(2, 70, 83, 2, 64, 64, dtype, False, (83, 40), (32, 16), 7)
    request, visible = case.request()
    params = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)

    def run(q, k, v, blocks):
        return tpu.run(replace(request, q=q, k=k, v=v, block_map=blocks), interpret=params)

    if traced:
        out, lse = jax.jit(run)(request.q, request.k, request.v, request.block_map)
    else:
        out, lse = jax.jit(partial(run, blocks=request.block_map))(request.q, request.k, request.v)
    check(out, lse, request, visible)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", [tpu, xla])
@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_weights_without_a_running_maximum(kernel, factor, dtype):
    """Logits around the bound, one query that sees only the least: no underflow, no overflow, on both sides."""
    highest = factor * kernel.LIMIT
    rng = np.random.default_rng(11)
    direction = rng.standard_normal(64)
    direction *= np.sqrt(highest) / np.linalg.norm(direction)
    q = np.stack([direction, -direction, 0.3 * direction, direction])
    k = np.concatenate([direction[None], -direction[None], rng.uniform(-1, 1, (46, 1)) * direction])
    shape = (1, -1, 1, 64)
    x = [jnp.asarray(a.reshape(shape), dtype) for a in (q, k, rng.standard_normal((48, 64)) * 1e3)]
    mask = np.ones((4, 48), bool)
    mask[3] = np.arange(48) == 1
    request = Request(*x, 1.0, None, from_mask(mask, 4, 16))
    if kernel is tpu:
        assert tpu._bounded(*x[:2], 1.0, 1).tolist() == [[int(factor < 1)]]
        run = partial(tpu.run, interpret=True)
    else:
        assert bool(xla._bounded(x[0][0, :, 0], x[1][0, :, 0], 1.0)) == (factor < 1)
        run = xla.run
    check(*compiled(run, request), request, mask[None, None])


def test_weights_of_float16_keep_to_its_range():
    """A logit of 20 is far below the bound, but its exponential is more than float16 holds."""
    rng = np.random.default_rng(12)
    direction = rng.standard_normal(16)
    direction *= np.sqrt(20.0) / np.linalg.norm(direction)
    q, k = (np.outer(rng.uniform(0.9, 1.0, n), direction).reshape(1, n, 1, 16) for n in (5, 7))
    q, k, v = (jnp.asarray(x, jnp.float16) for x in (q, k, rng.standard_normal((1, 7, 1, 16))))
    out, lse = compiled(xla.run, Request(q, k, v, 1.0))
    expected, expected_lse = oracle(q, k, v, 1.0, np.ones((1, 1, 5, 7), bool))
    np.testing.assert_allclose(out, expected, atol=5e-3)
    np.testing.assert_allclose(lse, expected_lse, atol=5e-3)


def test_exponentials_of_the_cpu_path():
    x = np.linspace(xla.LOWEST, xla.LIMIT, 200_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    for dtype, bound in ((jnp.float32, 1.2e-6), (jnp.bfloat16, 2.0**-8 + 1e-4)):
        got = np.asarray(jax.jit(lambda x, dtype=dtype: xla._exponential(x, dtype, chunks.CPU))(x), np.float64)
        assert np.abs(got / exact - 1).max() < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_nan_stays_one(dtype):
    """In its own query, and nowhere else."""
    rng = np.random.default_rng(13)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 1, 16)), dtype) for n in (5, 7, 7))
    expected, _ = compiled(xla.run, Request(q, k, v, 0.25))
    out, lse = compiled(xla.run, Request(q.at[0, 2, 0, 3].set(jnp.nan), k, v, 0.25))
    assert np.isnan(np.asarray(out[0, 2], np.float32)).all()
    assert np.isnan(lse[0, 2]).all()
    others = np.asarray([0, 1, 3, 4])
    atol = 1e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(*(np.asarray(x[0, others], np.float32) for x in (out, expected)), atol=atol)


def test_an_unknown_length_takes_the_exact_softmax():
    q = jnp.ones((1, 3, 4, 64)).at[0, 1, 3].set(jnp.nan)
    assert tpu._bounded(q, jnp.ones((1, 2, 4, 64)), 0.1, 2).tolist() == [[1, 0]]


def test_gradient_of_the_tpu_kernel():
    case = Case(2, 40, 50, 6, 64, 64, "float32", False, (50, 31), (16, 16), 8)
    request, visible = case.request()
    rng = np.random.default_rng(0)
    cotangents = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 40, 6, 64), (2, 40, 6))]

    def pull(q, k, v):
        def run(*x):
            return tpu.run(replace(request, q=x[0], k=x[1], v=x[2]), interpret=True)

        return jax.vjp(run, q, k, v)[1](tuple(cotangents))

    got = jax.jit(pull)(request.q, request.k, request.v)
    expected = oracle_gradients(request.q, request.k, request.v, request.scale, visible, *cotangents)
    for mine, right in zip(got, expected, strict=True):
        assert np.abs(mine - right).max() <= 2e-5 * np.abs(right).max()


@pytest.mark.parametrize("lengths", [None, (200, 31)])
def test_splash_interpreted(lengths):
    """Ragged tiles and lengths; its float32 products run at the accuracy of the device, here full."""
    case = Case(2, 150, 200, 2, 64, 128, "float32", False, lengths, None, 9)
    request, visible = case.request()
    out, lse = compiled(partial(splash.run, interpret=True), request)
    check(out, lse, request, visible)


@pytest.mark.skipif(not tokamax._installed(), reason="tokamax is not installed (extra `kernels`, Python >= 3.12)")
def test_tokamax_at_our_contract(monkeypatch):
    """Its plain operator, which any device runs, stands for the kernels."""
    monkeypatch.setattr(tokamax, "OPERATORS", {"cpu": "xla"})

    def body(case):
        request, visible = case.request()
        with jax.numpy_dtype_promotion("standard"):  # jax lowers its products of stated accuracy only so
            check(*compiled(tokamax.run, request), request, visible)

    over(cases().filter(lambda case: case.block is None and not case.large), 12, body)


def test_splash_without_keys():
    x = jnp.ones((1, 128, 1, 64))
    request = Request(x, x, x, 1.0, jnp.zeros((1,), jnp.int32))
    check(*compiled(partial(splash.run, interpret=True), request), request, np.zeros((1, 1, 128, 128), bool))


@pytest.mark.parametrize("lengths", [None, (16, 0)])
def test_cudnn_adapter_asks_for_what_the_contract_says(lengths, monkeypatch):
    """No GPU: cuDNN is replaced by float64 NumPy, so that only our part is tested."""
    case = Case(2, 24, 16, 3, 32, 32, "bfloat16", False, lengths, None, 10)
    request, visible = case.request()

    def stand_in(q, k, v, *, scale, return_residual, q_seqlen=None, kv_seqlen=None, mask_type=None):
        assert return_residual
        seen = np.ones((2, 1, 24, 16), bool)
        if kv_seqlen is not None:
            assert q_seqlen.tolist() == [24, 24]
            assert mask_type is cudnn.fused.MaskType.PADDING
            seen = seen & (np.arange(16) < np.asarray(kv_seqlen)[:, None])[:, None, None, :]
        out, lse = oracle(q, k, v, scale, seen)
        return jnp.asarray(out, q.dtype), jnp.asarray(lse.transpose(0, 2, 1), jnp.float32)

    monkeypatch.setattr(cudnn.fused, "dot_product_attention", stand_in)
    check(*cudnn._forward(request), request, visible)


def test_cudnn_gives_shapes_and_dtypes_of_the_contract(monkeypatch):
    """Its own shape rule, traced without a GPU: out as q, lse float32 before any rounding."""
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91_100)
    x = jax.ShapeDtypeStruct((2, 256, 3, 128), jnp.bfloat16)
    length = jax.ShapeDtypeStruct((2,), jnp.int32)
    out, lse = jax.eval_shape(lambda q, n: cudnn.run(Request(q, q, q, 0.1, n)), x, length)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert (lse.shape, lse.dtype) == ((2, 256, 3), jnp.float32)


def test_device_kernels_refuse_elsewhere_and_say_why():
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    report = explain(Request(x, x, x, 1.0)).splitlines()
    why_not = toolchain.attention()[1]
    ours = ["cpu: chosen", "xla: would serve"] if why_not is None else [f"cpu: refused, {why_not}", "xla: chosen"]
    expected = [
        "cudnn: refused, it runs on NVIDIA GPUs, the default device is cpu",
        "splash: refused, it runs on TPU, the default device is cpu",
        "hopper: refused, it runs on Hopper GPUs, the default device is cpu",
        "tpu: refused, it runs on TPU, the default device is cpu",
        *ours,
        "reference: would serve",
        "tokamax: refused, it runs on GPU and TPU, the default device is cpu"
        if tokamax._installed()
        else "tokamax: refused, tokamax is not installed (extra `kernels`, Python >= 3.12)",
    ]
    assert report[: len(expected)] == expected  # after them, what others registered in this process
    with pytest.raises(ValueError, match=r"head sizes \(64, 128\), got 96 for q"):
        tpu.run(Request(jnp.zeros((1, 8, 1, 96)), jnp.zeros((1, 8, 1, 96)), jnp.zeros((1, 8, 1, 64)), 1.0))


def test_reference_stops_where_the_score_matrix_gets_large():
    x = jax.ShapeDtypeStruct((1, 4_097, 1, 8), jnp.float32)
    assert "4096" in reference.supports(Request(x, x, x, 1.0)).reason
    with pytest.raises(ValueError, match=r"'reference' cannot serve this request.*got 4097"):
        choose(Request(x, x, x, 1.0), "reference")


def test_negative_scale_and_float64():
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(rng.standard_normal((1, 9, 2, 4))) for _ in range(3))
        out, lse = xla.run(Request(q, k, v, -0.7))
        expected, expected_lse = oracle(q, k, v, -0.7, np.ones((1, 1, 9, 9), bool))
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-12)


def test_vmap_over_requests():
    """A map over samples sees traced lengths per sample."""
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 1, 20, 2, 8)), jnp.float32) for _ in range(3))
    lengths = jnp.array([[20], [3], [0]], jnp.int32)
    out, lse = jax.vmap(lambda q, k, v, n: xla.run(Request(q, k, v, 0.4, n), SMALL))(q, k, v, lengths)
    visible = (np.arange(20) < np.asarray(lengths))[:, None, None, :]
    check(out[:, 0], lse[:, 0], Request(q[:, 0], k[:, 0], v[:, 0], 0.4), visible)


def test_choice_is_explained(monkeypatch):
    """A backend from outside is first asked, refuses with its reason, and serves what it accepts."""
    monkeypatch.setattr(contract, "_KERNELS", dict(registered()))
    fussy = Kernel("fussy", lambda r: Refusal("it wants one head") if r.q.shape[2] > 1 else None, reference.run)
    register(fussy, first=True)
    x = jnp.zeros((1, 3, 2, 4))
    chosen, passed = choose(Request(x, x, x, 1.0))
    ours = "cpu" if toolchain.attention()[1] is None else "xla"
    assert chosen.name == ours
    assert passed["fussy"] == "it wants one head"
    assert choose(Request(x[:, :, :1], x[:, :, :1], x[:, :, :1], 1.0))[0] is fussy
    with pytest.raises(ValueError, match="attention backend 'fast' is unknown; known: auto, fussy"):
        choose(Request(x, x, x, 1.0), "fast")
    report = explain(Request(x, x, x, 1.0))
    assert "fussy: refused, it wants one head" in report
    assert f"{ours}: chosen" in report


def test_from_mask_round_trip():
    rng = np.random.default_rng(5)
    mask = rng.random((37, 50)) < 0.4
    np.testing.assert_array_equal(from_mask(mask, 8, 16).dense(37, 50), mask)

"""The C++ kernel for CPUs: every way it multiplies, its gradients, its memory, and how it is compiled."""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.attention.kernels import Request, choose, explain
from sega_jax.attention.kernels.cpu import cpu, toolchain
from sega_jax.layouts.blocks import BlockMap, from_blocks, from_mask
from tests.attention.test_kernels import (
    CPU_SHAPES,
    Case,
    cases,
    check,
    compiled,
    oracle,
    oracle_gradients,
    over,
    skip_without_compiler,
)

# What other processors have, on this one; AMX's tiles in software.
BUILDS = {
    "AVX2": ("-march=x86-64-v3",),
    "AVX-512 without bfloat16": ("-march=x86-64-v4",),
    "tiles": ("-march=x86-64-v3", "-DSEGA_SOFTWARE_TILES"),
}


@pytest.fixture(autouse=True, scope="module")
def here():
    skip_without_compiler()
    assert toolchain.attention()[1] is None


@lru_cache
def built(name: str):
    if "v4" in BUILDS[name][0] and "avx512vl" not in toolchain._processor():
        pytest.skip("this processor has no AVX-512")
    library = toolchain.library(*BUILDS[name])
    target = f"sega_jax_attention_{list(BUILDS).index(name)}"
    tiles = cpu.register(library, target)
    assert tiles == (name == "tiles")
    return cpu.forward(target, tiles)


@pytest.mark.parametrize("name", BUILDS)
def test_other_processors(name):
    run = built(name)

    def body(case):
        request, visible = case.request()
        check(*compiled(run, request), request, visible)

    blocks = ((8, 8), (16, 8), (40, 300))
    over(cases(**{**CPU_SHAPES, "longest": 400, "blocks": blocks}), 25, body)


def test_it_is_what_auto_takes():
    for dtype in ("float32", "bfloat16"):
        x = jax.ShapeDtypeStruct((1, 256, 2, 128), dtype)
        assert choose(Request(x, x, x, 1.0))[0] is cpu.KERNEL
    half = jax.ShapeDtypeStruct((1, 256, 2, 128), "float16")
    assert "cpu: refused, it takes float32 and bfloat16, got float16" in explain(Request(half, half, half, 1.0))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients(dtype, traced):
    """Through out and lse; a constant map and a traced one."""
    case = Case(2, 60, 75, 3, 8, 24, dtype, False, (75, 31), (16, 8), 5)
    request, visible = case.request()
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(rng.standard_normal((2, 60, 3, 24)), dtype)
    d_lse = jnp.asarray(rng.standard_normal((2, 60, 3)), jnp.float32)

    def pull(q, k, v, blocks):
        _, back = jax.vjp(lambda *x: cpu.run(replace(request, q=x[0], k=x[1], v=x[2], block_map=blocks)), q, k, v)
        return back((d_out, d_lse))

    if traced:
        got = jax.jit(pull)(request.q, request.k, request.v, request.block_map)
    else:
        got = jax.jit(partial(pull, blocks=request.block_map))(request.q, request.k, request.v)
    expected = oracle_gradients(request.q, request.k, request.v, request.scale, visible, d_out, d_lse)
    bound = {"float32": 2e-5, "bfloat16": 2e-2}[dtype] * max(np.abs(x).max() for x in expected)
    for mine, right in zip(got, expected, strict=True):
        assert np.abs(np.asarray(mine).astype(np.float64) - right).max() <= bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_query_is_on_its_own(dtype):
    """The same bits whatever other queries, heads and samples come with it, so in whatever task it is computed."""
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 3, 64)), dtype) for n in (700, 900, 900))
    out, lse = compiled(cpu.run, Request(q, k, v, 0.125))
    for first, last in ((0, 1), (63, 70), (250, 700)):
        one, one_lse = compiled(cpu.run, Request(q[1:, first:last, 2:], k[1:, :, 2:], v[1:, :, 2:], 0.125))
        np.testing.assert_array_equal(one.astype(jnp.float32), out[1:, first:last, 2:].astype(jnp.float32))
        np.testing.assert_array_equal(one_lse, lse[1:, first:last, 2:])


def test_a_map_that_hides_nothing_changes_no_bit():
    """Blocks as wide as the kernel's own steps; several rows of the map share a task."""
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 2, 32)), jnp.float32) for n in (300, 800, 800))
    blocks = from_blocks(np.zeros((10, 4), int), np.zeros((0, 32, 256), bool), 32, 256)
    for mine, plain in zip(
        compiled(cpu.run, Request(q, k, v, 0.2, None, blocks)), compiled(cpu.run, Request(q, k, v, 0.2)), strict=True
    ):
        np.testing.assert_array_equal(mine, plain)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_that_are_not_positive(scale, dtype):
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 2, 5)), dtype) for n in (9, 40, 40))
    mask = rng.random((9, 40)) < 0.5
    request = Request(q, k, v, scale, None, from_mask(mask, 4, 8))
    check(*compiled(cpu.run, request), request, mask[None, None])


@pytest.mark.parametrize("name", ["cpu", *BUILDS])
def test_a_nan_stays_one(name):
    """In its own query, and nowhere else; in a key in every query that sees it."""
    run = cpu.run if name == "cpu" else built(name)
    rng = np.random.default_rng(5)
    for dtype in ("float32", "bfloat16"):
        q, k, v = (jnp.asarray(rng.standard_normal((1, n, 1, 16)), dtype) for n in (5, 300, 300))
        expected = compiled(run, Request(q, k, v, 0.25))
        got = compiled(run, Request(q.at[0, 2, 0, 3].set(jnp.nan), k, v, 0.25))
        for mine, right in zip(got, expected, strict=True):
            assert np.isnan(np.asarray(mine[0, 2], np.float32)).all()
            kept = [0, 1, 3, 4]
            np.testing.assert_array_equal(*(np.asarray(x[0, kept], np.float32) for x in (mine, right)))
        mask = np.ones((5, 300), bool)
        mask[3, 290] = False
        blocks = from_mask(mask, 5, 20)
        out, lse = compiled(run, Request(q, k.at[0, 290, 0, 0].set(jnp.nan), v, 0.25, None, blocks))
        for x in (out, lse):
            assert np.isnan(np.asarray(x[0, [0, 1, 2, 4]], np.float32)).all()
            assert np.isfinite(np.asarray(x[0, 3], np.float32)).all()


def test_many_keys_cost_no_accuracy():
    rng = np.random.default_rng(6)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 1, 16)), jnp.float32) for n in (3, 150_000, 150_000))
    out, lse = compiled(cpu.run, Request(q, k, v, 0.25))
    expected, expected_lse = oracle(q, k, v, 0.25, np.ones((1, 1, 3, 150_000), bool))
    assert np.abs(out - expected).max() <= 3e-6 * np.abs(expected).max()
    assert np.abs(lse - expected_lse).max() <= 1e-6 * np.abs(expected_lse).max()


def test_vmap():
    rng = np.random.default_rng(7)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 1, 20, 2, 8)), jnp.float32) for _ in range(3))
    lengths = jnp.array([[20], [3], [0]], jnp.int32)
    out, lse = jax.vmap(lambda q, k, v, n: cpu.run(Request(q, k, v, 0.4, n)))(q, k, v, lengths)
    visible = (np.arange(20) < np.asarray(lengths))[:, None, None, :]
    check(out[:, 0], lse[:, 0], Request(q[:, 0], k[:, 0], v[:, 0], 0.4), visible)


@pytest.mark.parametrize(
    ("count", "columns", "kinds", "words"),
    [
        ([1, 1], [[0], [2]], [[0], [0]], "visits a key block that is not there"),
        ([1, 1], [[0], [-1]], [[0], [0]], "visits a key block that is not there"),
        ([2, 2], [[0], [1]], [[0], [0]], "counts more visits than it lists"),
        ([1, 1], [[0], [1]], [[0], [2]], "names a pattern that is not there"),
        ([1, 1], [[0], [1]], [[-1], [0]], "names a pattern that is not there"),
        ([1], [[0]], [[0]], "too few rows"),
    ],
)
def test_a_map_that_points_outside_is_refused_not_read(count, columns, kinds, words):
    x = jnp.ones((1, 16, 1, 8))
    arrays = (np.array(a, np.int32) for a in (count, columns, kinds))
    blocks = BlockMap(8, 8, *arrays, np.ones((1, 8, 8), bool))
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        jax.block_until_ready(compiled(cpu.run, Request(x, x, x, 1.0, None, blocks)))


_MEMORY = """
import sys, jax, jax.numpy as jnp
from sega_jax.attention.kernels import Request, cpu
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
x = jnp.ones((1, 4096, 24, 128), sys.argv[1])
run = jax.jit(lambda x: cpu.run(Request(x, x, x, 0.1)))
program = run.lower(x).compile()
before = peak()
out, lse = jax.block_until_ready(program(x))
print(1024 * (peak() - before) - out.nbytes - lse.nbytes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_beside_the_result(dtype):
    """4,096 tokens, 24 heads: a few megabytes per thread."""
    done = subprocess.run([sys.executable, "-c", _MEMORY, dtype], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 * 2**20


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def undecided(monkeypatch):
    """The kernel is looked for anew."""
    monkeypatch.setattr(toolchain, "attention", toolchain.once(toolchain.look))


def reason() -> str:
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), "float32")
    return cpu.supports(Request(x, x, x, 1.0)).reason


def test_without_a_compiler_plain_xla_serves(monkeypatch, undecided, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert reason() == "there is no C++ compiler; install g++ or clang++, or name one in CXX"
    x = jnp.ones((1, 8, 1, 8))
    kernel, passed = choose(Request(x, x, x, 1.0))
    assert kernel.name == "xla"
    assert "no C++ compiler" in passed["cpu"]
    with pytest.raises(ValueError, match="'cpu' cannot serve this request: there is no C\\+\\+ compiler"):
        choose(Request(x, x, x, 1.0), "cpu")


def test_a_compiler_that_is_not_there(monkeypatch, undecided):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert reason() == "CXX=no-such-compiler -O1: no such command"


def test_processors_too_old_for_it(monkeypatch, undecided):
    monkeypatch.setenv("CXX", f"{toolchain.compiler()[0]} -mno-fma")
    assert "this processor has no fused multiply-add" in reason()


def test_a_compiler_that_fails(monkeypatch, undecided, tmp_path):
    fake = tmp_path / "c++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cc:1:2: error: it is Monday" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert reason() == f"{fake} cannot compile it: x.cc:1:2: error: it is Monday"


def test_what_does_not_run_is_not_kept(monkeypatch, undecided, tmp_path):
    """A compiler whose product crashes when loaded."""
    fake = tmp_path / "c++"
    fake.write_text('#!/bin/sh\nfor last; do :; done\n[ "$1" = --version ] || echo nonsense > "$last"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("SEGA_JAX_CACHE", str(tmp_path / "cache"))
    assert "what was compiled does not run here" in reason()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("SEGA_JAX_CACHE", str(tmp_path))
    toolchain.library()
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 1
    monkeypatch.setattr(toolchain, "_built", None)
    toolchain.library()
    with pytest.raises(TypeError):
        toolchain.library("-O1")  # other flags, another library


@pytest.fixture(scope="module")
def library_file(tmp_path_factory):
    """A compiled library, of which each test gets copies."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SEGA_JAX_CACHE", str(tmp_path_factory.mktemp("compiled")))
        toolchain.library()
        (kept,) = (toolchain.cache_folder() / "kernels").glob("*.so")
    return kept


@pytest.mark.parametrize("damage", ["half", "other", "0666", "folder"])
def test_a_kept_library_that_may_be_somebody_elses_is_compiled_anew(monkeypatch, tmp_path, damage, library_file):
    def built(_command, folder):
        return Path(shutil.copyfile(library_file, Path(folder) / "attention.so"))

    monkeypatch.setenv("SEGA_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(toolchain, "_built", built)
    toolchain.library()
    (kept,) = (tmp_path / "kernels").glob("*.so")
    whole = kept.read_bytes()
    kept.rename(tmp_path / "mapped by this process")
    shutil.copyfile(tmp_path / "mapped by this process", kept)
    match damage:
        case "half":  # mapping it would be a SIGBUS
            kept.write_bytes(whole[: len(whole) // 2])
        case "other":
            kept.write_bytes(b"not a library")
        case "0666":
            kept.chmod(0o666)
        case "folder":
            kept.parent.chmod(0o777)
    assert toolchain.library().sega_attention
    assert kept.read_bytes() == whole
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_the_trial_imports_nothing_from_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SEGA_JAX_CACHE", "off")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for module in ("ctypes", "sys", "encodings"):
        (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert toolchain.library().sega_attention
    assert not (tmp_path / "ran").exists()


def test_threads_that_need_it_at_once_compile_it_once(monkeypatch, undecided):
    calls, made = [], toolchain.library()

    def slow():
        calls.append(threading.get_ident())
        time.sleep(0.2)
        return made

    monkeypatch.setattr(toolchain, "library", slow)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: toolchain.attention(), range(4)))
    assert results == [(made, None)] * 4
    assert len(calls) == 1


@pytest.mark.parametrize("cache", ["off", "file"])
def test_where_nothing_can_be_kept(cache, monkeypatch, tmp_path, caplog):
    if cache == "file":
        (tmp_path / "file").write_text("")
        cache = str(tmp_path / "file" / "cache")
    monkeypatch.setenv("SEGA_JAX_CACHE", cache)
    with caplog.at_level(logging.WARNING):
        assert toolchain.library().sega_attention
    assert ("cannot be kept" in caplog.text) == (cache != "off")

"""ScaleDiff's attention (arXiv 2510.25818) against tables worked by hand and a float64 oracle looping over windows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.attention import attend
from sega_jax.geometry import RopeSpec
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.scalediff import Neighborhood, axis, patch_order
from sega_jax.layouts.streams import bind, ordered
from sega_jax.positional.rope import base_frequencies, plain
from sega_jax.sharding.mesh import make_mesh
from sega_jax.sharding.split import Split

SPEC = RopeSpec(dims=(4, 6, 6), trained=(4, 4))
PATHS = ("blocks", "windows")


def starts(tokens, native, offset=None, kv_mult=1.0):
    queries, keys = axis(tokens, native, kv_mult).starts(offset)
    return np.asarray(queries).tolist(), np.asarray(keys).tolist()


def run(layout, grid, streams, offsets=None, split=None):
    """Attention of un-rotated (q, k, v) streams, in raster order, under a layout with plain RoPE."""
    content = None if offsets is None else {"offsets": jnp.asarray(offsets, jnp.int32)[None]}
    ropes = {name: dict.fromkeys(("text", "image"), plain(g)) for name, g in layout.grids(grid).items()}
    q, k, v = (ordered(layout, grid, x) for x in streams)
    return ordered(layout, grid, attend(q, k, v, bind(layout.calls(grid, content), ropes), split=split), inverse=True)


def random_streams(grid, batch=1, heads=2, seed=0):
    random = np.random.default_rng(seed)
    sizes = {"text": grid.text_tokens, "image": grid.tokens}
    return tuple(
        {n: jnp.asarray(random.standard_normal((batch, size, heads, 16)), jnp.float32) for n, size in sizes.items()}
        for _ in range(3)
    )


def turned(x, ids):
    """[n, heads, D] rotated in float64 by ids [n, 3] through complex numbers."""
    frequencies = [base_frequencies(d, SPEC.theta) for d in SPEC.dims]
    angle = np.concatenate([ids[:, [a]] * f for a, f in enumerate(frequencies)], axis=1)[:, None]
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def softmax_attention(q, k, v):
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)


def oracle(grid, streams, window, offsets=None, local=False, kv=None):
    """One sample, window by window, by the paper's rule; ``local`` re-bases every window to 0."""
    q, k, v = ({n: np.asarray(x[0], np.float64) for n, x in s.items()} for s in streams)
    height, width, (h, w) = grid.height, grid.width, window
    kv_h, kv_w = kv or window
    u, t = offsets or (0, 0)
    image, texts = np.zeros_like(q["image"]), []
    rows, columns = (n // (side // 2) + (offsets is not None) for n, side in ((height, h), (width, w)))
    for i, j in itertools.product(range(rows), range(columns)):
        a, b = i * h // 2 - u, j * w // 2 - t
        r = min(max(a + h // 4 - kv_h // 2, 0), height - kv_h)
        c = min(max(b + w // 4 - kv_w // 2, 0), width - kv_w)
        asks = [
            (y, x) for y in range(a, a + h // 2) for x in range(b, b + w // 2) if 0 <= y < height and 0 <= x < width
        ]
        seen = [(y, x) for y in range(r, r + kv_h) for x in range(c, c + kv_w)]
        base = np.array([r, c]) if local else np.array([0, 0])

        def at(points, base=base):
            ids = np.zeros((len(points), 3))
            ids[:, 1:] = np.array(points).reshape(-1, 2) - base
            return ids, [y * width + x for y, x in points]

        text_ids = np.zeros((grid.text_tokens, 3))
        text_ids[:, 1:] = np.array([r, c]) - base
        key_ids, key_rows = at(seen)
        keys = np.concatenate([turned(k["text"], text_ids), turned(k["image"][key_rows], key_ids)])
        values = np.concatenate([v["text"], v["image"][key_rows]])
        texts.append(softmax_attention(turned(q["text"], text_ids), keys, values))
        if asks:
            ids, rows_of = at(asks)
            image[rows_of] = softmax_attention(turned(q["image"][rows_of], ids), keys, values)
    return {"image": image, "text": np.mean(texts, axis=0)}


def uniform(text, offsets=None, path="windows", batch=1):
    """Queries and keys zero, image values 8 y + x, one text value of 100."""
    grid = SPEC.grid(8, 8, text)
    silent = {"image": jnp.zeros((batch, 64, 1, 16)), "text": jnp.zeros((batch, text, 1, 16))}
    values = {
        "image": jnp.broadcast_to(jnp.arange(64.0)[None, :, None, None], (batch, 64, 1, 1)),
        "text": jnp.full((batch, text, 1, 1), 100.0),
    }
    out = run(Neighborhood(path=path), grid, (silent, silent, values), offsets)
    return np.asarray(out["image"]).reshape(batch, 8, 8), np.asarray(out.get("text", jnp.zeros(0))).ravel()


def test_window_tables():
    assert starts(8, 4) == ([0, 2, 4, 6], [0, 1, 3, 4])
    assert starts(4, 4) == ([0, 2], [0, 0])
    assert starts(16, 4)[1] == [0, 1, 3, 5, 7, 9, 11, 12]
    assert starts(128, 64)[1] == [0, 16, 48, 64]
    assert starts(256, 64)[1] == [0, 16, 48, 80, 112, 144, 176, 192]
    assert starts(128, 32)[1] == [n // 2 for n in starts(256, 64)[1]]


def test_block_map_holds_the_table_of_windows():
    grid = SPEC.grid(8, 8)
    (call,) = Neighborhood().calls(grid)  # without text there is one
    order = patch_order(*Neighborhood().axes(grid))
    assert order[24:28].tolist() == [20, 21, 28, 29]
    assert sorted(order.tolist()) == list(range(64))
    mask = np.zeros((64, 64), bool)
    mask[np.ix_(order, order)] = np.asarray(call.sets[0].block_map.dense(64, 64))
    expected = np.zeros((64, 64), bool)
    for (a, r), (b, c) in itertools.product(zip(*starts(8, 4), strict=True), repeat=2):
        seen = [8 * y + x for y in range(r, r + 4) for x in range(c, c + 4)]
        for y, x in itertools.product(range(a, a + 2), range(b, b + 2)):
            expected[8 * y + x, seen] = True
    np.testing.assert_array_equal(mask, expected)
    assert np.flatnonzero(mask[20])[::4].tolist() == [11, 19, 27, 35]  # window 6


def test_jittered_starts():
    assert starts(8, 4, 0) == ([0, 2, 4, 6, 8], [0, 1, 3, 4, 4])
    assert starts(8, 4, 1) == ([-1, 1, 3, 5, 7], [0, 0, 2, 4, 4])
    assert starts(8, 4, jnp.int32(2)) == ([-2, 0, 2, 4, 6], [0, 0, 1, 3, 4])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("text", [0, 1])
def test_uniform_attention(path, text):
    image, words = uniform(text, path=path, batch=3)
    band = np.array([0, 1, 3, 4])
    windows = 8 * band[:, None] + band[None, :] + 13.5
    if text:
        windows = (16 * windows + 100) / 17
        assert windows[0, 0] == pytest.approx(18.588235, abs=1e-6)
        assert windows[3, 3] == pytest.approx(52.470588, abs=1e-6)
        np.testing.assert_allclose(words, 35.529412, atol=1e-5)
    np.testing.assert_allclose(image, np.broadcast_to(windows.repeat(2, 0).repeat(2, 1), image.shape), atol=1e-5)


def test_uniform_attention_with_jitter():
    image, _ = uniform(0, (1, 2))
    bands = np.array([[13.5, 14.5, 16.5, 17.5], [29.5, 30.5, 32.5, 33.5], [45.5, 46.5, 48.5, 49.5]])
    np.testing.assert_allclose(image[0], bands.repeat([3, 2, 3], 0).repeat(2, 1), atol=1e-5)
    image, words = uniform(1, (1, 2))
    np.testing.assert_allclose(words, 35.152941, atol=1e-5)
    np.testing.assert_allclose(image[0, 0, 0], (16 * 13.5 + 100) / 17, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_one_window_is_dense(path):
    grid = SPEC.grid(4, 4, 3)
    streams = random_streams(grid, batch=2)
    got, expected = run(Neighborhood(path=path), grid, streams), run(Dense(), grid, streams)
    for name in ("image", "text"):
        np.testing.assert_allclose(np.asarray(got[name]), np.asarray(expected[name]), atol=2e-6)


@pytest.mark.parametrize(
    ("sides", "window", "kv_mult", "path", "offsets"),
    [
        ((8, 8), (4, 4), 1, "blocks", None),
        ((8, 8), (4, 4), 1, "windows", None),
        ((8, 8), (4, 4), 1, "windows", (1, 2)),
        ((8, 8), (4, 4), 1, "windows", (2, 0)),
        ((8, 24), (4, 8), 1, "blocks", None),
        ((8, 24), (4, 8), 1, "windows", (0, 3)),
        ((12, 24), (12, 8), 1, "blocks", None),
        ((16, 12), (4, 4), 1.5, "blocks", None),
        ((16, 12), (4, 4), 2, "blocks", None),
        ((16, 12), (4, 4), 2, "windows", (1, 1)),
        ((8, 8), (4, 4), 3, "blocks", None),
    ],
)
def test_against_the_oracle_and_its_rebased_form(sides, window, kv_mult, path, offsets):
    grid = SPEC.grid(*sides, 3)
    streams = random_streams(grid)
    got = run(Neighborhood(window, kv_mult, path=path), grid, streams, offsets)
    kv = tuple(min(n, int(kv_mult * side)) for n, side in zip(sides, window, strict=True))
    for local in (False, True):
        expected = oracle(grid, streams, window, offsets, local, kv)
        for name in ("image", "text"):
            np.testing.assert_allclose(np.asarray(got[name][0]), expected[name], atol=5e-6)


def test_zero_jitter_keeps_the_image_and_counts_border_windows_again():
    grid = SPEC.grid(8, 8, 3)
    streams = random_streams(grid)
    still, moved = (
        run(Neighborhood(path="windows"), grid, streams),
        run(Neighborhood(jitter=True), grid, streams, (0, 0)),
    )
    np.testing.assert_array_equal(np.asarray(still["image"]), np.asarray(moved["image"]))
    assert np.abs(np.asarray(still["text"] - moved["text"])).max() > 1e-4


@pytest.mark.parametrize("offsets", list(itertools.product(range(3), repeat=2)))
def test_constant_values_come_back_under_any_jitter(offsets):
    grid = SPEC.grid(8, 8, 2)
    q, k, v = random_streams(grid)
    v = {name: jnp.full_like(x, 0.75) for name, x in v.items()}
    out = run(Neighborhood(jitter=True), grid, (q, k, v), offsets)
    for x in out.values():
        np.testing.assert_allclose(np.asarray(x), 0.75, atol=1e-6)


@pytest.mark.parametrize(("path", "offsets"), [("blocks", None), ("windows", None), ("windows", (1, 2))])
def test_samples_do_not_mix(path, offsets):  # the published code stacks text and image copies in different orders
    grid = SPEC.grid(8, 8, 3)
    streams = random_streams(grid, batch=3)
    layout = Neighborhood(path=path)
    together = run(layout, grid, streams, offsets)
    for i in range(3):
        alone = run(layout, grid, tuple({n: x[i : i + 1] for n, x in s.items()} for s in streams), offsets)
        for name, x in alone.items():
            np.testing.assert_allclose(np.asarray(together[name][i]), np.asarray(x[0]), atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_locality(path):
    grid = SPEC.grid(16, 16, 2)
    q, k, v = random_streams(grid)
    changed = {**v, "image": v["image"].at[:, 0].add(1.0)}
    before, after = (run(Neighborhood(path=path), grid, (q, k, x)) for x in (v, changed))
    moved = np.abs(np.asarray(after["image"] - before["image"])).max((0, 2, 3)).reshape(16, 16) > 0
    expected = np.zeros((16, 16), bool)
    expected[:2, :2] = True
    np.testing.assert_array_equal(moved, expected)
    assert np.abs(np.asarray(after["text"] - before["text"])).max() > 0


def test_one_compilation_for_all_draws():
    grid = SPEC.grid(8, 8, 3)
    streams = random_streams(grid)
    jitted = jax.jit(lambda offsets: run(Neighborhood(jitter=True), grid, streams, offsets))
    made = [np.asarray(jitted(jnp.asarray(o, jnp.int32))["image"]) for o in ((0, 0), (1, 2), (2, 1))]
    assert jitted._cache_size() == 1
    assert np.abs(made[0] - made[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "sides", "words"),
    [
        ({"window": (4, 6)}, (8, 12), "multiple of 4"),
        ({}, (2, 8), "at least 4"),
        ({}, (9, 8), "multiple of 2"),
        ({"kv_mult": 1.2}, (8, 8), "kv_mult=1.2"),
        ({"jitter": True, "path": "blocks"}, (8, 8), "jitter"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, sides, words):
    with pytest.raises(ValueError, match=words):
        Neighborhood(**options).calls(SPEC.grid(*sides))


@pytest.mark.parametrize(
    ("layout", "offsets"),
    [(Neighborhood(), None), (Neighborhood(path="windows"), None), (Neighborhood(jitter=True), (1, 2))],
)
def test_eight_devices_give_what_one_gives(layout, offsets):
    grid = SPEC.grid(8, 8, 3)
    streams = random_streams(grid, batch=2, heads=4)
    split = Split.of(make_mesh(jax.devices()[:8], data=2, context=4), {"image": grid.tokens})
    alone, together = (run(layout, grid, streams, offsets, split=s) for s in (None, split))
    for name in ("image", "text"):
        np.testing.assert_allclose(np.asarray(together[name]), np.asarray(alone[name]), atol=2e-6)


@pytest.mark.slow
def test_block_map_path_holds_no_copy_per_window():
    """Windows with four times the keys take no more memory, where gathered windows would take all of it."""
    grid = RopeSpec(dims=(4, 6, 6), trained=(32, 32)).grid(96, 96, 16)
    shapes = {"text": (1, 16, 8, 16), "image": (1, grid.tokens, 8, 16)}
    streams = ({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()},) * 3
    key_bytes = 4 * np.prod(shapes["image"])

    def temporary(layout):
        compiled = jax.jit(lambda *streams: run(layout, grid, streams)).lower(*streams).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(Neighborhood()), temporary(Neighborhood(kv_mult=2.0))
    print(f"K {key_bytes / 1e6:.1f} MB; temporaries {small / 1e6:.1f} MB, windows twice the side {large / 1e6:.1f} MB")
    assert abs(large - small) < 0.5 * key_bytes
    assert small - temporary(Dense()) < 2 * key_bytes

"""The seam: four published layouts written as calls over streams, against tables of numbers worked by hand.

Nothing here knows a model.  Each case builds `Call`s by hand, binds plain or given rotations, and lets
`attend` join the streams; batch 2 with CFG duplication (4 rows) throughout.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.attention import attend
from sega_jax.costs.visits import pairs
from sega_jax.layouts.blocks import from_mask
from sega_jax.layouts.streams import Call, KeySet, Tokens, bind
from sega_jax.positional.rope import Rope

BATCH = 4  # two samples, each with and without the prompt


def batch(x):
    """[N, heads, D] -> [BATCH, N, heads, D], every sample different in scale of v only through the caller."""
    return jnp.asarray(np.broadcast_to(np.asarray(x, np.float32), (BATCH, *np.shape(x))))


def table(text: str) -> np.ndarray:
    return np.array([[float(x) for x in row.split()] for row in text.strip().splitlines()])


UNIT = Rope((jnp.ones(1), jnp.ones(1)), (jnp.ones(1), jnp.ones(1)))  # head dim 4: one pair for rows, one for columns

# CRPA on a fine lattice of 4x4, block (0, 1) refined; fine tokens first, then coarse
FINE = np.array([(0, 2), (0, 3), (1, 2), (1, 3)], np.float32)
COARSE = np.array([(0, 0), (1, 0), (1, 1)], np.float32)
# attention weights, by hand: logits are (cos of rows + cos of columns) / 2
TINY = """
.224789 .178630 .178630 .141949 .110729 .054544 .110729
.190836 .240150 .151648 .190836 .088789 .043737 .094004
.165611 .131603 .208406 .165611 .081579 .081579 .165611
.142228 .178982 .178982 .225232 .066174 .066174 .142228
.246727 0 0 0 .310484 .246727 .196062
.196062 0 0 0 .246727 .310484 .246727
.246727 0 0 0 .196062 .246727 .310484
"""
# the same with one text token at (0, 0); rows of text, two fine queries and a coarse one
TINY_WITH_TEXT = """
.233492 .115016 .086328 .091398 .068601 .233492 .115016 .056656
.099691 .202380 .160822 .160822 .127798 .099691 .049107 .099691
.236923 .188272 0 0 0 .236923 .188272 .149611
.163923 .206283 0 0 0 .163923 .206283 .259588
"""


def crpa_calls(text: int, traced_index: bool):
    rope = ("any", "image")
    origin = np.zeros((text, 2), np.float32)
    top_left = np.array([0], np.int32)
    if traced_index:  # a region that differs per sample would come in like this
        top_left = np.broadcast_to(top_left, (BATCH, 1))
    words = (Tokens("text", rope, origin),) if text else ()
    fine_call = (*words, Tokens("fine", rope, FINE))
    fine_keys = (*fine_call, Tokens("coarse", rope, 2 * COARSE))
    coarse_keys = (*words, Tokens("fine", rope, FINE[:1] / 2, top_left), Tokens("coarse", rope, COARSE))
    return (
        Call((KeySet(fine_call, fine_keys),), ("scatter",) * len(fine_call)),
        Call((KeySet((Tokens("coarse", rope, COARSE),), coarse_keys),), ("scatter",)),
    )


@pytest.mark.parametrize("traced_index", [False, True])
@pytest.mark.parametrize("text", [0, 1])
def test_crpa_weights(text, traced_index):
    total = text + 7
    one_hot = np.eye(total, dtype=np.float32)[:, None]  # one head
    probe = np.tile(np.array([1, 0, 1, 0], np.float32), (total, 1, 1))
    cuts = {"text": (0, text), "fine": (text, text + 4), "coarse": (text + 4, total)}

    def streams(x):
        return {name: batch(x[a:b]) for name, (a, b) in cuts.items() if b > a}

    calls = bind(crpa_calls(text, traced_index), {"any": {"image": UNIT}})
    out = attend(streams(probe), streams(probe), streams(one_hot), calls)
    weights = np.concatenate([np.asarray(out[name]) for name in cuts if name in out], axis=1)[:, :, 0]
    expected = table(TINY_WITH_TEXT if text else TINY)
    rows = [0, 1, 5, 7] if text else list(range(7))
    for sample in weights:
        np.testing.assert_allclose(sample[rows], expected, atol=2e-6)


def starts(tokens: int, native: int, jitter: int = 0, patches: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """ScaleDiff query and window starts along one axis (arXiv 2510.25818)."""
    side = native // 2
    count = tokens // side if patches is None else patches
    query = np.arange(count) * side - jitter
    return query, np.clip(query - native // 4, 0, tokens - native)


def windows(size: int, native: int, jitter: tuple[int, int] | None = None):
    """Query and key indices per window, [G, patch], [G, native^2]; queries off the grid point at ``size**2``."""
    extra = 0 if jitter is None else 1
    shift = jitter or (0, 0)
    axes = [starts(size, native, s, size // (native // 2) + extra) for s in shift]
    queries, keys, corners = [], [], []
    for a, r in zip(*axes[0], strict=True):
        for b, c in zip(*axes[1], strict=True):
            rows, columns = np.meshgrid(a + np.arange(native // 2), b + np.arange(native // 2), indexing="ij")
            inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
            queries.append(np.where(inside, rows * size + columns, size * size).ravel())
            rows, columns = np.meshgrid(r + np.arange(native), c + np.arange(native), indexing="ij")
            keys.append((rows * size + columns).ravel())
            corners.append((r, c))
    return np.array(queries, np.int32)[None], np.array(keys, np.int32)[None], np.array(corners, np.float32)


def scalediff_calls(size: int, native: int, text: int, jitter=None):
    """Neighborhood patch attention: one group per window, text re-phased to the window's corner."""
    queries, keys, corners = windows(size, native, jitter)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).reshape(-1, 2)
    ids = np.concatenate([grid, np.zeros((1, 2))]).astype(np.float32)  # the last row serves padding
    rope = ("any", "image")
    words = (Tokens("text", rope, np.repeat(corners[None, :, None], text, 2)),) if text else ()
    asking = (*words, Tokens("image", rope, ids[queries], queries))
    answering = (*words, Tokens("image", rope, ids[keys], keys))
    return (Call((KeySet(asking, answering),), ("mean",) * len(words) + ("scatter",)),)


def test_scalediff_windows():
    queries, keys, corners = windows(8, 4)
    assert starts(8, 4)[1].tolist() == [0, 1, 3, 4]
    assert sorted(queries.ravel().tolist()) == list(range(64))
    assert queries[0, 6].tolist() == [20, 21, 28, 29]
    assert keys[0, 6, ::4].tolist() == [11, 19, 27, 35]
    assert corners[14].tolist() == [4, 3]


@pytest.mark.parametrize(
    ("text", "jitter", "corner_value", "text_value"),
    [(0, None, 13.5, None), (1, None, 18.588235, 35.529412), (0, (1, 2), 13.5, None), (1, (1, 2), None, 35.152941)],
)
def test_scalediff_uniform_attention(text, jitter, corner_value, text_value):
    calls = bind(scalediff_calls(8, 4, text, jitter), {"any": {"image": UNIT}})
    silent = {"image": batch(np.zeros((64, 1, 4)))} | ({"text": batch(np.zeros((1, 1, 4)))} if text else {})
    values = {"image": batch(np.arange(64.0)[:, None, None])}
    if text:
        values["text"] = batch(np.full((1, 1, 1), 100.0))
    out = attend(silent, silent, values, calls)
    image = np.asarray(out["image"]).reshape(BATCH, 8, 8)
    if corner_value is not None:
        np.testing.assert_allclose(image[:, 0, 0], corner_value, rtol=1e-6)
    if text_value is not None:
        np.testing.assert_allclose(np.asarray(out["text"]).ravel(), text_value, rtol=1e-6)
    if (text, jitter) == (0, None):
        rows = np.array([0, 1, 3, 4])
        expected = 8 * rows[:, None] + rows[None, :] + 13.5
        np.testing.assert_allclose(image, np.broadcast_to(expected.repeat(2, 0).repeat(2, 1), image.shape), rtol=1e-6)
    if (text, jitter) == (0, (1, 2)):
        assert np.unique(image[0], axis=0).shape[0] == 3
        np.testing.assert_allclose(
            image[0, ::3, ::2], table("13.5 14.5 16.5 17.5\n29.5 30.5 32.5 33.5\n45.5 46.5 48.5 49.5")
        )


P_ROWS = (
    ["11" + "1" * 16 + "0000"] * 2
    + ["11" + "1111000000000000" + "1111"] * 4
    + ["11" + "0000111100000000" + "1111"] * 4
    + ["11" + "0000000011110000" + "1111"] * 4
    + ["11" + "0000000000001111" + "1111"] * 4
    + ["11" + "0" * 16 + "1111"] * 4
)
K_ROWS = (
    ["11" + "1" * 16 + "0000"] * 2
    + ["1111110000000000001100", "1111110000000010101100", "1111111100000000001100", "1111111100100010101100"]
    + ["1100111111000000000111", "1100111111101000100111", "1100001111000000000111", "1100001111101000000111"]
    + ["1100010101111100110011", "1100000000111100110011", "1100000101111100000011", "1100000000111100000011"]
    + ["1101010000000011111110", "1100000000000011111110", "1101010100110011111110", "1100000000110011111110"]
    + ["00" + "0" * 16 + "1111"] * 4
)  # written out by hand: 2 text tokens, 4 x 4 in windows of 2 x 2 along the Hilbert curve, 4 small tokens


def mask(rows) -> np.ndarray:
    return np.array([[c == "1" for c in row] for row in rows])


def test_scale_dit_block_counts():
    assert mask(P_ROWS).sum() == 220
    whole = from_mask(mask(P_ROWS), 2, 2)
    assert whole.visited == 55
    assert len(whole.patterns) == 0
    assert mask(K_ROWS).sum() == 224
    assert from_mask(mask(K_ROWS), 2, 2).visited == 73


@pytest.mark.parametrize("rows", [P_ROWS, K_ROWS])
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_scale_dit_three_streams(rows, backend):
    """Text, windows and the low-resolution stream under one block map; for mask P also values worked by hand."""
    u = 4.0 * np.arange(22)[:, None] + np.arange(4)
    q, k, v = (f[:, None] for f in (np.sin(0.10 * u), np.cos(0.07 * u), np.sin(0.05 * u + 0.3)))
    cuts = {"text": (0, 2), "image": (2, 18), "low": (18, 22)}

    def streams(x):
        return {name: batch(x[a:b]) for name, (a, b) in cuts.items()}

    tokens = tuple(Tokens(name) for name in cuts)
    whole = Call((KeySet(tokens, tokens, from_mask(mask(rows), 2, 2)),), ("scatter",) * 3)
    out = attend(streams(q), streams(k), streams(v), (whole,), backend=backend)
    got = np.concatenate([np.asarray(out[name]) for name in cuts], axis=1)[:, :, 0]

    scores = np.where(mask(rows), (q[:, 0] @ k[:, 0].T) / 2, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = (weights / weights.sum(1, keepdims=True)) @ v[:, 0]
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), atol=1e-5)
    if rows is P_ROWS:
        by_hand = {0: ".483017 .476884 .469559 .461060", 10: ".437438 .398119 .357805 .316596"}
        for row, values in by_hand.items():
            np.testing.assert_allclose(got[0, row], table(values)[0], atol=2e-6)
        assert abs(got[0].sum() - 0.83965838) < 1e-5


def test_text_hub_by_merging():
    """Scale-DiT's image rows as two key sets, [text, low] dense and the windows, merged by log-sum-exp."""
    rng = np.random.default_rng(0)
    x = {name: batch(rng.standard_normal((n, 2, 8))) for name, n in (("text", 2), ("image", 16), ("low", 4))}
    asks = (Tokens("image"),)
    local = from_mask(mask(P_ROWS)[2:18, 2:18], 4, 4)
    split = Call((KeySet(asks, (Tokens("text"), Tokens("low"))), KeySet(asks, (Tokens("image"),), local)), ("scatter",))
    columns = np.r_[0:2, 18:22, 2:18]
    joint = from_mask(mask(P_ROWS)[2:18][:, columns], 2, 2)
    whole = Call((KeySet(asks, (Tokens("text"), Tokens("low"), Tokens("image")), joint),), ("scatter",))
    np.testing.assert_allclose(
        np.asarray(attend(x, x, x, (split,))["image"]), np.asarray(attend(x, x, x, (whole,))["image"]), atol=1e-6
    )


def test_padding_and_ragged_keys():
    """Padding indices ask nothing; per-sample key counts hide keys; a query without keys gets zero, not NaN."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 6, 1, 4)), jnp.float32)
    index = np.array([[4, 1, 6], [0, 6, 6]], np.int32)  # 6 is padding
    length = jnp.array([2, 0], jnp.int32)
    keys = KeySet((Tokens("image"),), (Tokens("image", index=index, length=length),))
    out = np.asarray(attend({"image": x}, {"image": x}, {"image": x}, (Call((keys,), ("scatter",)),))["image"])
    scores = np.einsum("qhd,khd->qk", x[0], x[0, [4, 1]]) / 2
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(out[0, :, 0], weights @ np.asarray(x[0, [4, 1], 0]), atol=1e-6)
    np.testing.assert_array_equal(out[1], 0)


def test_positions_per_sample():
    """f32 [b, n, axes] are positions of samples, not of groups: as each sample alone, under ropes of its own too."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((2, 5, 1, 4)), jnp.float32)
    ids = rng.integers(0, 9, (2, 5, 2)).astype(np.float32)
    for frequency in (jnp.ones(1), jnp.asarray([[1.0], [0.5]])):
        out = []
        for rows in (slice(None), slice(0, 1), slice(1, 2)):
            own = frequency[rows] if frequency.ndim > 1 else frequency
            rope = Rope((own, jnp.ones(1)), (jnp.ones(1), jnp.ones(1)))
            tokens = (Tokens("image", ("any", "image"), ids[rows]),)
            calls = bind((Call((KeySet(tokens, tokens),), ("scatter",)),), {"any": {"image": rope}})
            streams = {"image": x[rows]}
            out.append(np.asarray(attend(streams, streams, streams, calls)["image"]))
        np.testing.assert_allclose(out[0], np.concatenate(out[1:]), atol=1e-6)
        assert np.abs(out[1] - out[2]).max() > 1e-2


def test_per_sample_and_per_head_ropes():
    """Frequencies per sample and magnitudes per head reach the logits as the square of the magnitude."""
    rng = np.random.default_rng(2)
    q, k = (rng.standard_normal((3, 5, 2, 4)).astype(np.float32) for _ in range(2))
    one_hot = np.broadcast_to(np.eye(5, dtype=np.float32)[None, :, None], (3, 5, 2, 5))
    frequency = rng.uniform(0.1, 1, (3, 1)).astype(np.float32)
    magnitude = rng.uniform(1, 1.3, (1, 2, 1)).astype(np.float32)
    ids = rng.integers(0, 9, (5, 2)).astype(np.float32)
    rope = Rope((jnp.asarray(frequency), jnp.ones(1)), (jnp.asarray(magnitude), jnp.ones(1)))
    tokens = (Tokens("image", ("any", "image"), ids),)
    calls = bind((Call((KeySet(tokens, tokens),), ("scatter",)),), {"any": {"image": rope}})
    weights = np.asarray(
        attend({"image": jnp.asarray(q)}, {"image": jnp.asarray(k)}, {"image": jnp.asarray(one_hot)}, calls)["image"]
    )

    def pair(x):
        return x[..., 0::2] + 1j * x[..., 1::2]

    for sample in range(3):
        for head in range(2):
            omega = np.array([frequency[sample, 0], 1.0])
            turn = np.exp(1j * ids * omega)
            gain = np.array([magnitude[0, head, 0] ** 2, 1.0])
            a, b = pair(q[sample, :, head]) * turn, pair(k[sample, :, head]) * turn
            logits = np.real((a[:, None] * gain) * b.conj()[None]).sum(-1) / 2
            expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            np.testing.assert_allclose(weights[sample, :, head], expected, atol=2e-6)


def test_a_causal_set_and_grouped_keys():
    """Text sees the text before it, the image sees everything (a block-causal prompt): against a mask in float64."""
    rng = np.random.default_rng(6)
    heads, grouped = 4, 2
    q = {name: rng.standard_normal((2, n, heads, 8)) for name, n in (("text", 5), ("image", 7))}
    k, v = ({name: rng.standard_normal((2, n, grouped, 8)) for name, n in (("text", 5), ("image", 7))} for _ in "kv")
    text, image = Tokens("text"), Tokens("image")
    calls = (
        Call((KeySet((text,), (text,), causal=True),), ("scatter",)),
        Call((KeySet((image,), (text, image)),), ("scatter",)),
    )
    out = attend(*({n: jnp.asarray(x, jnp.float32) for n, x in part.items()} for part in (q, k, v)), calls)
    whole = [np.concatenate([part["text"], part["image"]], 1) for part in (q, k, v)]
    seen = np.ones((12, 12), bool)
    seen[:5] = np.tril(np.ones((5, 12), bool))
    for head in range(heads):
        scores = np.einsum("bqd,bkd->bqk", whole[0][:, :, head], whole[1][:, :, head // 2]) / np.sqrt(8)
        weights = np.exp(np.where(seen, scores, -np.inf))
        expected = (weights / weights.sum(-1, keepdims=True)) @ whole[2][:, :, head // 2]
        got = np.concatenate([out["text"], out["image"]], 1)[:, :, head]
        np.testing.assert_allclose(got, expected, atol=2e-6)
    assert pairs(calls, {"text": 5, "image": 7}) == seen.sum()


def test_a_rope_per_head_needs_keys_of_as_many_heads():
    rope = Rope((jnp.ones((1, 4, 2)),), (jnp.ones((1, 4, 2)),))
    tokens = (Tokens("image", ("any", "image"), np.zeros((3, 1), np.float32)),)
    calls = bind((Call((KeySet(tokens, tokens),), ("scatter",)),), {"any": {"image": rope}})
    q, k = ({"image": jnp.ones((1, 3, heads, 4))} for heads in (4, 2))
    with pytest.raises(ValueError, match=r"stream 'image' has 2 heads, its rope 4 .*one for all heads"):
        attend(q, k, k, calls)

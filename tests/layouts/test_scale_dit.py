"""The layout of Scale-DiT against masks written out pair by pair, and its published counts."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.attention import attend
from sega_jax.geometry import RopeSpec
from sega_jax.layouts.scale_dit import ScaleDiT, _exact, _units, block_map, places, units
from sega_jax.layouts.streams import bind
from sega_jax.positional.rope import plain

FLUX = RopeSpec()
SMALL = RopeSpec(dims=(4, 6, 6), trained=(16, 16))  # windows of 4 x 4, cells of one token


def pairs(layout: ScaleDiT, grid) -> np.ndarray:
    """The mask over [text, image, low] in the layout's order, from the rules of the two masks alone."""
    window = layout.window_of(grid)
    where = layout.places(grid)
    i, j, cell_q = where["image"]
    a, b, cell_k = where["low"]
    t, n, m = grid.text_tokens, len(i), len(a)
    ones, zeros = (lambda r, c: np.ones((r, c), bool)), (lambda r, c: np.zeros((r, c), bool))
    if layout.mask == "paper":
        local, low, small, hub = cell_q[:, None] == cell_q, ones(n, m), ones(m, m), ones(m, t)
    else:
        far, near = window // 2, max(1, window // 8)
        local = (np.abs(i[:, None] - i) <= far) & (np.abs(j[:, None] - j) <= far)
        low = np.abs(cell_q[:, None] - cell_k) <= 1
        small = (np.abs(a[:, None] - a) <= near) & (np.abs(b[:, None] - b) <= near)
        hub = zeros(m, t)
    if layout.semantics == "block":
        unit_q, unit_k = window**2 // 2, window**2 // 4

        def whole(part):
            q, k = part.shape
            padded = np.pad(part, ((0, -q % unit_q), (0, -k % unit_k)))
            kept = padded.reshape(len(padded) // unit_q, unit_q, -1, unit_k).any((1, 3))
            return kept.repeat(unit_q, 0).repeat(unit_k, 1)[:q, :k]

        local, low, small = whole(local), whole(low), whole(small)
    return np.block([[ones(t, t + n), zeros(t, m)], [ones(n, t), local, low], [hub, zeros(m, n), small]])


@pytest.mark.parametrize(
    "layout",
    [
        ScaleDiT(),
        ScaleDiT(block=(32, 8)),
        ScaleDiT(semantics="exact", block=(32, 16)),
        ScaleDiT(mask="paper"),
        ScaleDiT(ordering="hilbert", block=(16, 16)),
        ScaleDiT(ordering="hilbert-windows", semantics="exact", block=(16, 8)),
        ScaleDiT(low="off"),
        ScaleDiT(mask="paper", low="off", ordering="raster", block=(16, 16)),
    ],
    ids=str,
)
def test_attention_is_masked_dense_attention(layout):
    """Outputs at their own tokens, whatever the order: every backend that runs here, 8 x 12 tokens, 2 samples."""
    grid = SMALL.grid(8, 12, text_tokens=8)
    low = layout.low_grid(grid)
    rng = np.random.default_rng(0)
    sizes = {"text": 8, "image": grid.tokens} | ({"low": low.tokens} if layout.low == "stream" else {})

    def draw():
        return {name: jnp.asarray(rng.standard_normal((2, n, 2, 16)), jnp.float32) for name, n in sizes.items()}

    q, k, v = draw(), draw(), draw()
    rope = plain(grid)
    calls = bind(layout.calls(grid), {"image": {"text": rope, "image": rope}})

    where = layout.places(grid)
    orders = {
        "image": where["image"].row * 12 + where["image"].column,
        "low": where["low"].row * 3 + where["low"].column,
    }
    ids = grid.ids()
    ids["low"] = 4 * low.ids()["image"]
    omega = [np.asarray(f) for f in rope.frequencies]
    mask = pairs(layout, grid)
    mask = mask[: sum(sizes.values()), : sum(sizes.values())]

    def joined(x, turn):
        parts = []
        for name in sizes:
            order = orders.get(name, np.arange(sizes[name]))
            y = np.asarray(x[name], np.float64)[:, order]
            if turn:
                angle = np.concatenate([ids[name][order][:, a : a + 1] * omega[a] for a in range(3)], 1)[:, None]
                z = (y[..., 0::2] + 1j * y[..., 1::2]) * np.exp(1j * angle)
                y = np.stack([z.real, z.imag], -1).reshape(y.shape)
            parts.append(y)
        return np.concatenate(parts, 1)

    scores = np.einsum("bqhd,bkhd->bhqk", joined(q, True), joined(k, True)) / 4
    weights = np.where(mask, np.exp(scores), 0)
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), joined(v, False))
    for backend in ("xla", "reference"):
        out = attend(q, k, v, calls, backend=backend)
        assert set(out) == set(sizes)
        got = np.concatenate([np.asarray(out[n])[:, orders.get(n, np.arange(s))] for n, s in sizes.items()], 1)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_paper_mask_does_not_depend_on_the_order():
    grid = SMALL.grid(8, 8, text_tokens=4)
    rng = np.random.default_rng(1)
    sizes = {"text": 4, "image": 64, "low": 4}
    x = {name: jnp.asarray(rng.standard_normal((1, n, 1, 16)), jnp.float32) for name, n in sizes.items()}
    ropes = {"image": dict.fromkeys(("text", "image"), plain(grid))}
    outs = [
        attend(x, x, x, bind(ScaleDiT(mask="paper", semantics=s, ordering=o, block=(8, 8)).calls(grid), ropes))
        for o, s in (("windows", "block"), ("hilbert", "exact"), ("raster", "exact"), ("connected", "exact"))
    ]
    for other in outs[1:]:
        for name in sizes:
            np.testing.assert_allclose(np.asarray(outs[0][name]), np.asarray(other[name]), atol=2e-6)


@pytest.mark.parametrize(("side", "exact", "expanded"), [(1024, 5_682_596, 8_470_528), (2048, 22_268_132, 35_520_512)])
def test_published_pairs(side, exact, expanded):
    """Token pairs as the authors' code printed them, before and after expansion to 128 x 64."""
    grid = FLUX.grid_for_pixels(side, side, 512)
    layout = ScaleDiT()
    where, reach = layout.places(grid), layout.reaches(grid)
    count = 512 * (512 + grid.tokens) + grid.tokens * 512
    for q, k, name in (("image", "image", "image"), ("image", "low", "low"), ("low", "low", "alone")):
        number, patterns = _exact(where[q], where[k], reach[name], 128, 64)
        held = np.array([128 * 64, *(pattern.sum() for pattern in patterns)])
        count += held[number[number >= 0]].sum()
    assert count == exact
    assert block_map(side // 16, side // 16, 512, "kernel", 128, 64).visited * 128 * 64 == expanded


def test_published_blocks_at_8192_by_16384():
    assert units(8192 // 16, 16384 // 16, 512, "kernel").sum() == 146_728


@pytest.mark.parametrize(
    ("side", "ordering", "blocks"),
    [(1024, "hilbert", 920), (2048, "hilbert", 3_772), (2048, "hilbert-windows", 4_336)],
)
def test_occupancy_of_other_orders(side, ordering, blocks):  # counted pair by pair by another program
    grid = FLUX.grid_for_pixels(side, side, 512)
    layout = ScaleDiT(ordering=ordering)
    where, reach = layout.places(grid), layout.reaches(grid)
    if ordering == "hilbert-windows":  # the strip of the small stream follows the cells' own numbers
        where = where | {"low": places(grid.height // 4, grid.width // 4, 4, "windows")}
    kept = sum(
        _units(where[q], where[k], reach[name], 128, 64).sum()
        for q, k, name in (("image", "image", "image"), ("image", "low", "low"), ("low", "low", "alone"))
    )
    assert kept + 4 * (8 + grid.tokens // 64) + grid.tokens // 128 * 8 == blocks


@pytest.mark.parametrize(
    ("side", "mask", "speedup"), [(4096, "kernel", 3.88), (6144, "kernel", 7.62), (4096, "paper", 3.35)]
)
def test_ideal_speedup(side, mask, speedup):
    """Counted operations of FLUX.1, attention and linear layers, dense over Scale-DiT."""
    tokens = (side // 16) ** 2
    linear, pair, layers = 57 * 12 * 3072**2 * 2, 4 * 128 * 24, 57
    pairs_seen = block_map(side // 16, side // 16, 512, mask, 128, 64).visited * 128 * 64
    dense = linear * (512 + tokens) + layers * pair * (512 + tokens) ** 2
    ours = linear * (512 + tokens + tokens // 16) + layers * pair * pairs_seen
    assert dense / ours == pytest.approx(speedup, abs=0.006)


def test_closed_form_equals_expansion():
    for height, width in ((64, 64), (48, 80)):
        grid = FLUX.grid(height, width, 512)
        layout = ScaleDiT()
        where, reach = layout.places(grid), layout.reaches(grid)
        whole = units(height, width, 0, "kernel")
        n, m = height * width // 128, height * width // 64
        np.testing.assert_array_equal(_units(where["image"], where["image"], reach["image"], 128, 64), whole[:n, :m])
        np.testing.assert_array_equal(_units(where["image"], where["low"], reach["low"], 128, 64), whole[:n, m:])
        np.testing.assert_array_equal(_units(where["low"], where["low"], reach["alone"], 128, 64), whole[n:, m:])


def test_positions():
    grid = FLUX.grid(64, 64, 512)
    *_, low_call = ScaleDiT().calls(grid)
    (low,) = low_call.sets[0].queries
    at = int(np.flatnonzero(low.index == 1 * 16 + 1)[0])
    assert low.ids[at].tolist() == [0, 4, 4]
    (image,) = ScaleDiT().calls(grid)[1].sets[0].queries
    at = int(np.flatnonzero(image.index == 4 * 64 + 4)[0])
    assert image.ids[at].tolist() == [0, 4, 4]


def test_streams():
    def named(**options):
        return [(s.name, s.sigma, s.adapter) for s in ScaleDiT(**options).streams()]

    low = ("low", 0.0, "all")
    assert named() == [("text", None, None), ("image", None, None), low]
    both = [("text", None, "attention"), ("image", None, "attention")]
    assert named(adapt="flux1") == [*both, low]
    assert named(low="cached", adapt="flux1") == both
    assert named(low="off", adapt="flux1") == named(low="off") == [("text", None, None), ("image", None, None)]
    assert named(low="alone") == [low]


def test_no_square_of_the_sequence_in_calls():
    grid = FLUX.grid_for_pixels(4096, 4096, 512)
    (_, image, low) = ScaleDiT().calls(grid)
    (local,) = image.sets
    assert local.block_map.visited + low.sets[0].block_map.visited + 4 * (512 + grid.tokens) // 128 == 9_256
    parts = ScaleDiT(mask="paper").calls(grid)[1].sets
    assert [s.block_map is None for s in parts] == [True, False]  # text and small picture dense, windows sparse
    assert parts[1].block_map.visited == 2 * grid.tokens // 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "K"}, "mask='K'"),
        ({"window": 6}, "window=6"),
        ({"window": 8, "ratio": 3}, "window=8"),
        ({"ordering": "spiral"}, "ordering='spiral'"),
        ({"low": "maybe"}, "low='maybe'"),
        ({"mask": "paper", "low": "cached"}, "mask='paper'"),
        ({"radius": -1}, "radius=-1"),
        ({"semantics": "fuzzy"}, "semantics='fuzzy'"),
        ({"adapt": "all"}, "adapt='all'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        ScaleDiT(**options)


@pytest.mark.parametrize(("height", "nearest"), [(1000, 1024), (2200, 2304), (2170, 2048), (64, 256)])
def test_sizes_between_windows_are_refused_with_the_nearest(height, nearest):
    grid = replace(FLUX.grid(1, 64, 512), height=max(1, height // 16))
    with pytest.raises(ValueError, match=f"try height={nearest}"):
        ScaleDiT().check(grid)


def test_blocks_of_a_kernel_must_hold_whole_units():
    with pytest.raises(ValueError, match="block="):
        ScaleDiT(block=(128, 48)).calls(FLUX.grid(64, 64, 512))

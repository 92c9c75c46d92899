"""Mixed-resolution attention against the paper's toy (arXiv 2511.19778), tables worked by hand, and hand-made masks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.attention import attend
from sega_jax.geometry import RopeSpec
from sega_jax.layouts.crpa import Mixed, arrange, band_counts, core, present, up
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.streams import bind
from sega_jax.positional.rope import Rope, plain
from sega_jax.sampling.regions import (
    Auto,
    Drawn,
    Regions,
    best_box,
    best_cells,
    energy,
    get_regions,
    overlay,
    parse_regions,
)

SPEC = RopeSpec(dims=(4, 6, 6), theta=100.0, trained=(8, 8), pixels_per_token=16)
HEADS, WIDTH = 2, 16


def layout_of(masks, shape, **options):
    masks = tuple(
        jnp.asarray(np.asarray(mask, bool))[None] if np.ndim(mask) == 2 else jnp.asarray(mask) for mask in masks
    )
    layout = Mixed.fitting(masks, shape, **options)
    return layout, arrange(masks, layout), masks


def ropes_of(layout, grid, rope=None):
    return {name: dict.fromkeys(("text", "image"), rope or plain(g)) for name, g in layout.grids(grid).items()}


def run(layout, content, grid, streams, rope=None, values=None):
    @jax.jit
    def attended(content, streams, values):
        calls = bind(layout.calls(grid, content), ropes_of(layout, grid, rope))
        return attend(streams["q"], streams["k"], values, calls)

    return attended(content, streams, values or streams["v"])


def random_streams(tokens, text=0, batch=2, seed=0, width=WIDTH):
    rng = np.random.default_rng(seed)

    def one():
        image = jnp.asarray(rng.standard_normal((batch, tokens, HEADS, width)), jnp.float32)
        words = jnp.asarray(rng.standard_normal((batch, text, HEADS, width)), jnp.float32)
        return {"image": image} | ({"text": words} if text else {})

    return {name: one() for name in "qkv"}


def dense(grid, streams, order=None):
    """Plain attention over a whole grid whose tokens come in ``order``."""
    calls = Dense().calls(grid)
    if order is not None or not grid.text_tokens:
        (call,) = calls
        keep = [t for t in call.sets[0].keys if t.stream in streams["q"]]
        tokens = tuple(
            type(t)(t.stream, t.rope, t.ids if order is None or t.stream == "text" else t.ids[order]) for t in keep
        )
        calls = (type(call)((type(call.sets[0])(tokens, tokens),), ("scatter",) * len(tokens)),)

    @jax.jit
    def attended(streams):
        rope = plain(grid)
        bound = bind(calls, {"image": {"text": rope, "image": rope}})
        return attend(streams["q"], streams["k"], streams["v"], bound)

    return attended(streams)


# -- identities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [0, 3])
def test_all_refined_is_plain_attention(text):
    grid = SPEC.grid(4, 6, text)
    layout, content, _ = layout_of([np.ones((2, 3))], (4, 6))
    assert layout.capacity == (24, 0)
    assert layout.plain == 0
    streams = random_streams(24, text)
    out = run(layout, content, grid, streams)
    order = np.asarray(content.index[0][0])
    assert order[:8].tolist() == [0, 1, 6, 7, 2, 3, 8, 9]
    for name, expected in dense(grid, streams, order).items():
        np.testing.assert_array_equal(np.asarray(out[name]), np.asarray(expected))
    back = np.argsort(order)
    raster = {x: {n: v[:, back] if n == "image" else v for n, v in streams[x].items()} for x in "qkv"}
    np.testing.assert_allclose(np.asarray(out["image"])[:, back], np.asarray(dense(grid, raster)["image"]), atol=1e-5)


@pytest.mark.parametrize("text", [0, 3])
def test_nothing_refined_is_the_coarse_model(text):  # where text asks on the coarse grid
    fine, coarse = SPEC.grid(8, 12, text), SPEC.grid(4, 6, text)
    layout, content, _ = layout_of([np.zeros((4, 6))], (8, 12), pads=(2, 2))
    assert layout.capacity == (0, 24)
    assert layout.plain == 1
    streams = random_streams(24, text)
    out = run(Mixed.sized([0], (8, 12)), content, fine, streams)
    for name, expected in dense(coarse, streams).items():
        np.testing.assert_array_equal(np.asarray(out[name]), np.asarray(expected))


def logits(layout, content, grid, streams, rope=None):
    """Weights of every query over the sequence, from one-hot values."""
    total = layout.tokens + grid.text_tokens
    eye = np.broadcast_to(np.eye(total, dtype=np.float32)[None, :, None], (2, total, HEADS, total))
    cuts = {"text": eye[:, : grid.text_tokens], "image": eye[:, grid.text_tokens :]}
    return run(layout, content, grid, streams, rope, {n: jnp.asarray(cuts[n]) for n in streams["q"]})


def test_shift_invariance():
    """All positions of a group moved alike: the same image weights; with text in the softmax they do change."""
    layout, content, _ = layout_of([BLOCK_B], (8, 8))
    for text in (0, 2):
        grid = SPEC.grid(8, 8, text)
        streams = random_streams(28, text)
        expected = run(layout, content, grid, streams)["image"]
        for shift in ((2, 4), (1, 3)):
            moved = layout.calls(grid, content)
            add = jnp.asarray([[[0.0, *shift]]], jnp.float32)

            def shifted(tokens, group, add=add):
                return tuple(replace(t, ids=t.ids + add / 2**group) if t.stream == "image" else t for t in tokens)

            moved = tuple(
                replace(
                    c, sets=tuple(replace(s, queries=shifted(s.queries, g), keys=shifted(s.keys, g)) for s in c.sets)
                )
                for g, c in enumerate(moved)
            )
            bound = bind(moved, ropes_of(layout, grid))
            out = jax.jit(attend)(streams["q"], streams["k"], streams["v"], bound)["image"]
            difference = float(jnp.abs(out - expected).max())
            assert difference < 1e-5 if not text else difference > 1e-3


def place(layout, content, grid, unit):
    return np.asarray(layout.positions_in(grid, content, unit))[0, :, 1:]


def test_equal_displacements_have_equal_phases():
    grid = SPEC.grid(4, 4)
    layout, content, _ = layout_of([BLOCK_A], (4, 4))
    fine, coarse = (place(layout, content, grid, unit) for unit in (0, 1))
    # fine query (0, 2), key one coarse cell on: as a coarse token (1, 1) and as a fine one at (2, 2)
    assert (fine[6] - fine[0]).tolist() == [2, 0]
    assert fine[2].tolist() == [1, 2]
    assert (coarse[0] - coarse[4]).tolist() == [0, 1]  # top left of the block from coarse (0, 0): one cell
    assert (coarse[6] - coarse[5]).tolist() == [0, 1]


def test_coarse_rows_are_the_coarse_model_and_read_top_left_keys_only():
    grid, small = SPEC.grid(8, 8), SPEC.grid(4, 4)
    layout, content, _ = layout_of([BLOCK_B], (8, 8))
    streams = random_streams(28)
    out = np.asarray(run(layout, content, grid, streams)["image"])
    cells = np.r_[[5, 6, 9, 10], np.asarray(content.index[1][0])]  # raster cells of keys 0, 4, 8, 12, 16...
    keys = np.r_[[0, 4, 8, 12], np.arange(16, 28)]
    back = np.argsort(cells)
    native = {x: {"image": streams[x]["image"][:, keys][:, back]} for x in "qkv"}
    expected = np.asarray(dense(small, native)["image"])[:, cells[4:]]
    np.testing.assert_allclose(out[:, 16:], expected, atol=1e-6)

    others = np.setdiff1d(np.arange(16), [0, 4, 8, 12])
    disturbed = {x: {"image": streams[x]["image"].at[:, others].add(3.0)} for x in "qkv"}
    again = np.asarray(run(layout, content, grid, disturbed)["image"])
    np.testing.assert_array_equal(again[:, 16:], out[:, 16:])
    assert np.abs(again[:, :16] - out[:, :16]).max() > 0.1


@pytest.mark.parametrize("text", [0, 3])
def test_fine_rows_are_those_of_fine_positions_for_all(text):
    grid = SPEC.grid(8, 8, text)
    streams = random_streams(28, text)
    aligned, content, _ = layout_of([BLOCK_B], (8, 8))
    single, _, _ = layout_of([BLOCK_B], (8, 8), positions="pi-hr")
    ours, theirs = (np.asarray(run(x, content, grid, streams)["image"]) for x in (aligned, single))
    np.testing.assert_array_equal(ours[:, :16], theirs[:, :16])
    assert np.abs(ours[:, 16:] - theirs[:, 16:]).max() > 1e-2


# -- tables ------------------------------------------------------------------------------------------------------

BLOCK_A = np.array([[0, 1], [0, 0]], bool)
BLOCK_B = np.pad(np.ones((2, 2), bool), 1)


def test_toy_of_the_paper():  # nine coarse cells, cells 3 and 4 refined
    mask = np.zeros((1, 9), bool)
    mask[:, 3:5] = True
    layout, content, _ = layout_of([mask], (2, 18))
    grid = SPEC.grid(2, 18)
    fine, coarse = (place(layout, content, grid, unit) for unit in (0, 1))
    top = fine[:8][fine[:8, 0] == 0, 1]
    assert top.tolist() == [6, 7, 8, 9]
    assert fine[8:, 1].tolist() == [0, 2, 4, 10, 12, 14, 16]
    seen = np.asarray(content.keys[1][0])
    assert coarse[seen][:2, 1].tolist() == [3, 4]
    assert coarse[seen][2:, 1].tolist() == [0, 1, 2, 5, 6, 7, 8]


def test_three_levels():  # 16 fine cells; the first row of a strip four fine tokens high
    outer = np.array([[0, 1, 1, 0]], bool)
    inner = np.zeros((2, 8), bool)
    inner[:, 4:6] = True
    layout, content, masks = layout_of([inner, outer], (4, 16))
    assert [int(m.sum()) for m in core(masks)] == [16, 4, 2]
    grid = SPEC.grid(4, 16)
    assert layout.capacity == (16, 4, 2)
    expected = {0: [0, 4, 6, 8, 9, 10, 11, 12], 1: [0, 2, 3, 4, 5, 6], 2: [0, 1, 2, 3]}
    for group, columns in expected.items():
        places = place(layout, content, grid, group)[np.asarray(content.keys[group][0])]
        assert sorted(places[places[:, 0] == 0, 1].tolist()) == columns
    assert layout.room == (22, 10, 4)  # places, each once
    assert layout.pairs(0) == 16 * 22 + 4 * 10 + 2 * 4


def test_tiny_grids():  # positions and keys of two; the first one's weights are below and in test_seam
    layout, content, _ = layout_of([BLOCK_A], (4, 4))
    grid = SPEC.grid(4, 4)
    assert place(layout, content, grid, 0).astype(int).tolist() == [
        [0, 2], [0, 3], [1, 2], [1, 3], [0, 0], [2, 0], [2, 2]
    ]  # fmt: skip
    assert place(layout, content, grid, 1)[:4].tolist() == [[0, 1], [0, 1.5], [0.5, 1], [0.5, 1.5]]
    assert np.asarray(content.keys[0][0]).tolist() == list(range(7))
    assert np.asarray(content.keys[1][0]).tolist() == [0, 4, 5, 6]

    layout, content, _ = layout_of([BLOCK_B], (8, 8))
    grid = SPEC.grid(8, 8)
    assert place(layout, content, grid, 0)[:16].astype(int).tolist() == [
        [2, 2], [2, 3], [3, 2], [3, 3], [2, 4], [2, 5], [3, 4], [3, 5],
        [4, 2], [4, 3], [5, 2], [5, 3], [4, 4], [4, 5], [5, 4], [5, 5],
    ]  # fmt: skip
    assert np.asarray(content.keys[1][0]).tolist() == [0, 4, 8, 12, *range(16, 28)]
    assert layout.pairs(0) == 640
    ends = place(layout, content, grid, 1)[16:]
    assert ends.astype(int).tolist() == [
        [0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 3], [2, 0], [2, 3], [3, 0], [3, 1], [3, 2], [3, 3]
    ]  # fmt: skip


# Weights of BLOCK_A's tokens, worked by hand: logits are (cos of rows + cos of columns) / 2.  Rows of a fine and of a
# coarse query, then of the two baselines.
TINY = """
.224789 .178630 .178630 .141949 .110729 .054544 .110729
.246727 0 0 0 .310484 .246727 .196062
.150052 .112625 .119240 .089498 .304618 .150052 .073915
.167034 .157116 .157116 .147788 .132734 .105478 .132734
"""
# the same with one text token at (0, 0)
TINY_WITH_TEXT = """
.233492 .115016 .086328 .091398 .068601 .233492 .115016 .056656
.099691 .202380 .160822 .160822 .127798 .099691 .049107 .099691
.236923 .188272 0 0 0 .236923 .188272 .149611
.163923 .206283 0 0 0 .163923 .206283 .259588
"""


def table(text):
    return np.array([[float(x) for x in row.split()] for row in text.strip().splitlines()])


def weights_of(words, **options):
    spec = RopeSpec(dims=(2, 2, 2), theta=10.0, trained=(2, 2))
    grid = spec.grid(4, 4, words)
    layout, content, _ = layout_of([BLOCK_A], (4, 4), **options)
    probe = np.zeros((2, 7 + words, HEADS, 4), np.float32)
    probe[..., [0, 2]] = 1
    cuts = {"image": jnp.asarray(probe[:, words:])} | ({"text": jnp.asarray(probe[:, :words])} if words else {})
    rope = Rope((jnp.zeros((0,)), jnp.ones(1), jnp.ones(1)), (jnp.ones((0,)), jnp.ones(1), jnp.ones(1)))
    out = logits(layout, content, grid, {"q": cuts, "k": cuts, "v": cuts}, rope)
    rows = [np.asarray(out[n])[1, :, 0] for n in ("text", "image") if n in out]
    return np.concatenate(rows)


def test_a_region_per_sample():
    """A batch with regions of its own equals its samples one by one, bands and all."""
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2, :2] = True
    masks[1, 2:, 1:3] = True
    grid = SPEC.grid(8, 8, 2)
    layout, content, _ = layout_of([masks], (8, 8), pads=(2, 1))
    streams = random_streams(layout.tokens, 2)
    valid = [np.asarray(content.index[level]) < (64, 16)[level] for level in (0, 1)]
    valid = np.concatenate(valid, axis=1)
    together = np.asarray(run(layout, content, grid, streams)["image"])
    for row in range(2):
        own = jax.tree.map(lambda x, row=row: x[row : row + 1], (content, streams))
        alone = np.asarray(run(layout, own[0], grid, own[1])["image"])
        np.testing.assert_allclose(together[row][valid[row]], alone[0][valid[row]], atol=1e-6)


def test_weights_of_the_tiny_grid():  # through the layout itself
    expected = table(TINY)
    ours = weights_of(0)
    np.testing.assert_allclose(ours[[0, 4]], expected[:2], atol=2e-6)
    np.testing.assert_allclose(weights_of(0, positions="pi-hr")[4], expected[2], atol=2e-6)
    np.testing.assert_allclose(weights_of(0, positions="pi-lr")[0], expected[3], atol=2e-6)
    np.testing.assert_allclose(weights_of(1)[[0, 1, 5, 7]], table(TINY_WITH_TEXT), atol=2e-6)
    coarse = weights_of(1, text="coarse")
    np.testing.assert_allclose(coarse[[1, 5, 7]], table(TINY_WITH_TEXT)[1:], atol=2e-6)
    assert np.count_nonzero(coarse[0]) == 5  # text now sees the coarse group's keys


def test_phases_of_positions():
    q, k = np.arange(1, 9) / 8, np.arange(8, 0, -1) / 8
    omega = np.array([1, 0.01])

    def logit(a, b):
        angle = np.concatenate([(a[0] - b[0]) * omega, (a[1] - b[1]) * omega])
        z = (q[::2] + 1j * q[1::2]) * np.exp(1j * angle) * (k[::2] - 1j * k[1::2])
        return float(z.real.sum())

    mask = np.zeros((2, 2), bool)
    mask[0, 1] = True
    grid = SPEC.grid(4, 4)
    layout, content, _ = layout_of([mask], (4, 4))
    fine, coarse = (place(layout, content, grid, unit) for unit in (0, 1))
    assert logit(fine[1], fine[6]) == pytest.approx(1.126062, abs=1e-6)
    assert logit(coarse[1], coarse[6]) == pytest.approx(1.695875, abs=1e-6)  # PI to the coarse grid
    assert logit(coarse[6], coarse[0]) == pytest.approx(1.597211, abs=1e-6)
    assert logit(fine[6], fine[0]) == pytest.approx(1.257399, abs=1e-6)  # PI to the fine grid


# -- bands -------------------------------------------------------------------------------------------------------


def test_bands_in_one_dimension():
    mask = np.zeros((1, 1, 10), bool)
    mask[..., 4:8] = True
    refined = (jnp.asarray(mask),)
    fine, coarse = (np.asarray(m)[0, 0] for m in present(refined, (2, 1)))
    assert np.flatnonzero(fine).tolist() == list(range(6, 18))
    assert np.flatnonzero(coarse).tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    assert band_counts(refined, (2, 1)).tolist() == [[6, 2]]
    layout = Mixed.fitting(refined, (2, 20), pads=(2, 1))
    content = arrange(refined, layout)
    grid = SPEC.grid(2, 20)
    seen = [
        place(layout, content, grid, g)[np.asarray(content.keys[g][0][: int(content.key_count[g][0])])] for g in (0, 1)
    ]
    own = seen[0][seen[0][:, 0] == 0, 1]
    assert sorted(own.tolist()) == sorted([*range(6, 18), 0, 2, 4, 18])
    assert sorted(seen[1][:, 1].tolist()) == list(range(10))
    assert int(content.key_count[1][0]) == 10


@pytest.mark.parametrize("levels", [2, 3])
def test_every_place_is_seen_once_by_every_level(levels):
    """With bands of any width each query's keys tile the plane, all on integers of its grid."""
    rng = np.random.default_rng(levels)
    size = 16
    for pads in ((2, 2), (4, 1)):
        masks, outer = [], None
        for level in range(levels - 1, 0, -1):
            mask = rng.random((2, size >> level, size >> level)) < 0.5
            mask[0] = np.pad(np.ones((2, 2), bool), ((1, (size >> level) - 3),) * 2)
            mask = mask if outer is None else mask & np.asarray(up(outer))
            masks.insert(0, mask)
            outer = mask
        layout, content, refined = layout_of(masks, (size, size), pads=pads)
        grid = SPEC.grid(size, size)
        alive = present(refined, pads)
        for level in range(levels):
            index = np.asarray(content.index[level])
            assert ((index < alive[level][0].size).sum(1) == np.asarray(alive[level]).sum((1, 2))).all()
        lattice = np.concatenate([np.full(n, level) for level, n in enumerate(layout.capacity)])
        for group in layout.groups:
            places = np.asarray(layout.positions_in(grid, content, group))[..., 1:]
            for sample in range(2):
                keys = np.asarray(content.keys[group])[sample][: int(content.key_count[group][sample])]
                at = places[sample][keys]
                assert (at == np.floor(at)).all()
                cover = np.zeros((size >> group, size >> group), int)
                for (row, column), level in zip(at.astype(int), lattice[keys], strict=True):
                    side = 2 ** max(level - group, 0)
                    cover[row : row + side, column : column + side] += 1
                assert (cover == 1).all()


def test_one_layout_for_all_boxes_of_a_budget():
    grid = SPEC.grid(64, 64)
    layouts = {
        Mixed.fitting(parse_regions(text).masks(grid), (64, 64), pads=(2, 2))
        for text in ("box:0,0,256,256", "box:512,512,256,256", "box:128,0,512,128", "box:400,96,128,512")
    }
    assert len(layouts) == 2  # boxes on cell borders; the last one touches a ninth column of cells
    scattered = np.zeros((1, 32, 32), bool)
    scattered[:, ::4, ::4] = True
    layout = Mixed.fitting((scattered,), (64, 64), pads=(2, 2))
    counts = np.asarray(band_counts((jnp.asarray(scattered),), (2, 2)))[0]
    assert layout.capacity[0] >= 4 * counts[0]
    assert layout.capacity[1] >= 1024 - counts[1]


# -- regions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["center:0.3", "box:0,0,64,32", "box:0.25,0.0,0.5,0.5", "auto:0.3", "autobox:0.15", "auto:0.5|auto:0.2",
             "box:0,0,64,64+box:128,128,64,64", "center:0.5|center:0.1", "auto:0.3:numpy:abs"]
)  # fmt: skip
def test_regions_print_as_they_are_read(text):
    assert str(parse_regions(text)) == text
    assert parse_regions(str(parse_regions(text))) == parse_regions(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("disc:0.3", "is no region; expected center:SHARE"),
        ("center:0", "no share of the picture above 0"),
        ("center:x", "no share of the picture above 0"),
        ("box:1,2,3", "is no box; expected"),
        ("box:0.5,0,64,64", "mixes fractions and pixels"),
        ("auto:0.3+center:0.2", "stands alone"),
        ("auto:0.2|auto:0.3", "shares must fall"),
        ("auto:0.3:x", "expected energy or module:name"),
        ("mask:", "is no region"),
    ],
)
def test_wrong_regions_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_regions(text)


def test_masks_of_shapes(tmp_path):
    from PIL import Image

    grid = SPEC.grid(16, 24)
    (mask,) = parse_regions("box:30,0,4,33+box:0.5,0.5,0.5,0.5").masks(grid)
    expected = np.zeros((8, 12), bool)
    expected[:2, :2] = True
    expected[4:, 6:] = True
    np.testing.assert_array_equal(mask[0], expected)
    (mask,) = parse_regions("center:0.25").masks(grid)
    assert mask.sum() == 24
    np.testing.assert_array_equal(mask[0], mask[0, ::-1, ::-1])

    drawing = np.zeros((256, 384), np.uint8)
    drawing[31, 352] = 255
    Image.fromarray(drawing).save(tmp_path / "m.png")
    regions = parse_regions(f"mask:{tmp_path / 'm.png'}")
    (mask,) = regions.masks(grid)
    assert np.argwhere(mask[0]).tolist() == [[0, 11]]
    assert parse_regions(str(regions)) == regions
    Image.fromarray(255 - drawing).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="has changed"):
        parse_regions(str(regions))
    small = np.zeros((3, 5), bool)
    small[1, 2] = True  # coarser than the cells: each cell shows what it lies in
    (mask,) = get_regions(small).masks(grid)
    assert mask[0].sum() > 1
    with pytest.raises(ValueError, match="refines nothing"):
        Regions(((Drawn.of(np.zeros((4, 4), bool)),),)).masks(grid)
    with pytest.raises(ValueError, match="expected bool"):
        get_regions(np.ones((4, 4)))


def test_levels_nest():
    grid = SPEC.grid(16, 24)
    for text in ("center:0.2", "box:64,64,64,64", "center:0.5|center:0.1"):
        inner, outer = parse_regions(text).spread(2).masks(grid)
        assert inner.shape == (1, 8, 12)
        assert outer.shape == (1, 4, 6)
        assert (inner <= up(outer)).all()
        assert outer.sum() * 4 > inner.sum()
    with pytest.raises(ValueError, match="levels of regions"):
        parse_regions("center:0.5|center:0.1").spread(1)


def test_the_most_salient_places():
    rng = np.random.default_rng(0)
    score = jnp.asarray(rng.random((2, 6, 8)), jnp.float32)
    mask = np.asarray(best_cells(score, 10))
    assert mask.sum((1, 2)).tolist() == [10, 10]
    assert (np.asarray(score)[mask].reshape(2, 10).min(1) >= np.where(mask, -1, score).max((1, 2))).all()
    assert np.flatnonzero(np.asarray(best_cells(jnp.ones((1, 2, 3)), 2))).tolist() == [0, 1]  # ties by raster order
    box = np.asarray(best_box(score, 2, 3))
    sums = [[float(score[0, r : r + 2, c : c + 3].sum()) for c in range(6)] for r in range(5)]
    r, c = np.unravel_index(np.argmax(sums), (5, 6))
    assert box[0, r : r + 2, c : c + 3].all()
    assert box.sum((1, 2)).tolist() == [6, 6]

    picture = np.zeros((1, 16, 16, 2), np.float32)
    picture[:, 8:, 8:] = rng.standard_normal((1, 8, 8, 2))
    picture += 5  # a flat picture has none, whatever its level
    found = np.asarray(energy(jnp.asarray(picture), SPEC.grid(8, 8)))
    assert (found[0, 5:, 5:] > 0.5).all()
    assert np.abs(found[0, :2, :2]).max() < 1e-3
    inner, outer = parse_regions("auto:0.1").spread(2).choose(jnp.asarray(picture), SPEC.grid(8, 8))
    assert inner.shape == (1, 16, 16)
    assert (np.asarray(inner) <= np.asarray(up(outer))).all()
    assert Auto(0.1).count(8, 8) * 4 == int(inner.sum())


def test_overlay_shows_the_levels():
    levels = np.array([[0, 1], [1, 2]], np.int8)
    drawn = overlay(np.zeros((8, 8, 3), np.float32), levels)
    assert drawn[1, 1, 0] == 0
    assert drawn[1, 6, 0] < 0
    assert drawn[6, 6, 1] < drawn[1, 6, 1]
    assert drawn[4, 0].tolist() == pytest.approx([1.0, 0.2, -0.8])


def test_gradients_of_packing():
    layout, content, refined = layout_of([BLOCK_B], (8, 8), pads=(2, 1))
    rng = np.random.default_rng(0)
    canvases = {
        "level0": jnp.asarray(rng.standard_normal((2, 64, 3)), jnp.float32),
        "level1": jnp.asarray(rng.standard_normal((2, 16, 3)), jnp.float32),
    }
    back = layout.leave(layout.enter(canvases, content), canvases, content)
    slopes = jax.grad(lambda c: layout.enter(c, content)["image"].sum())(canvases)
    for level, mask in enumerate(present(refined, (2, 1))):
        there = np.broadcast_to(np.asarray(mask).reshape(1, -1, 1), canvases[f"level{level}"].shape)
        np.testing.assert_array_equal(np.asarray(back[f"level{level}"]), np.where(there, canvases[f"level{level}"], 0))
        np.testing.assert_array_equal(np.asarray(slopes[f"level{level}"]), there.astype(np.float32))

"""Streams of several lengths in one batch: masked text in joint attention, against a dense mask in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.attention import attend
from sega_jax.geometry import RopeSpec
from sega_jax.layouts.blocks import from_mask
from sega_jax.layouts.crpa import Mixed, arrange
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.scalediff import Neighborhood
from sega_jax.layouts.streams import Call, KeySet, Tokens, bind, ordered
from sega_jax.positional.rope import plain, tables
from sega_jax.sharding.mesh import make_mesh
from sega_jax.sharding.split import Split, pad_axis

SPEC = RopeSpec(dims=(4, 6, 6), trained=(4, 4), ids="centered")
TEXT, HEADS, KEY_HEADS, WIDTH = 5, 6, 3, 16
LENGTHS = np.array([5, 2, 0, 3], np.int32)
GRID = SPEC.grid(5, 3, TEXT)


def streams(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        {n: jnp.asarray(rng.standard_normal((len(LENGTHS), size, heads, WIDTH)), jnp.float32)
         for n, size in sizes.items()}
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )  # fmt: skip


def oracle(qkv, order, turned, visible):
    """Attention of all streams in ``order`` in float64; ``visible`` bool [B, Nk]; every stream's output."""
    q, k, v = (np.concatenate([np.asarray(part[n], np.float64) for n in order], 1) for part in qkv)
    if turned is not None:
        cos, sin = (np.concatenate([np.asarray(turned[n][i], np.float64) for n in order])[:, None] for i in (0, 1))

        def turn(x):
            pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)
            return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

        q, k = turn(q), turn(k)
    k, v = (x.repeat(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(np.where(visible[:, None, None], scores, -np.inf))
    out = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    cuts = np.cumsum([qkv[0][n].shape[1] for n in order])[:-1]
    return dict(zip(order, np.split(out, cuts, 1), strict=True))


def seen(*parts):
    """Visible keys, bool [B, N], of streams given as (size, lengths or None)."""
    return np.concatenate(
        [np.arange(n) < (np.full(len(LENGTHS), n) if given is None else given)[:, None] for n, given in parts], 1
    )


def dense_case():
    """Prompts of four lengths beside one picture, one of them empty; what the padding holds must not matter."""
    sizes = {"text": TEXT, "image": GRID.tokens}
    q, k, v = streams(sizes)
    for part in (k, v):
        hidden = jnp.arange(TEXT)[None] >= LENGTHS[:, None]
        part["text"] = jnp.where(hidden[..., None, None], 1e3, part["text"])
    ids = GRID.ids()
    turned = {n: tables(plain(GRID), ids[n]) for n in sizes}
    expected = oracle((q, k, v), ("text", "image"), turned, seen((TEXT, LENGTHS), (GRID.tokens, None)))
    ropes = {"image": dict.fromkeys(("text", "image"), plain(GRID))}
    return (q, k, v), bind(Dense().calls(GRID), ropes, {"text": jnp.asarray(LENGTHS)}), expected


@pytest.mark.parametrize("backend", ["auto", "xla", "reference"])
def test_masked_text(backend):
    qkv, calls, expected = dense_case()
    out = attend(*qkv, calls, backend=backend)
    for name, value in expected.items():
        np.testing.assert_allclose(out[name], value, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        ("ring", {"context": 4}),
        ("ring+xla", {"context": 2, "data": 2}),
        ("ulysses", {"context": 2, "data": 4}),  # padded key heads
        ("ulysses", {"context": 3}),
        ("product", {"context": 6}),
        ("auto", {"data": 2, "tensor": 3}),
    ],
)
def test_masked_text_on_a_mesh(backend, sizes):
    """15 picture tokens: no number of devices here but three divides them."""
    (q, k, v), calls, expected = dense_case()
    mesh = make_mesh(jax.devices()[: np.prod(list(sizes.values()))], **sizes)
    split = Split.of(mesh, {"image": GRID.tokens})

    @jax.jit
    def sharded(q, k, v):
        q, k, v = ({n: pad_axis(x, 1, split.padded(n, x.shape[1])) for n, x in part.items()} for part in (q, k, v))
        out = attend(q, k, v, calls, backend=backend, split=split)
        return {n: split.leave(n, x) for n, x in out.items()}

    for name, value in sharded(q, k, v).items():
        np.testing.assert_allclose(value, expected[name], atol=2e-5)


@pytest.mark.parametrize("scheme", ["ring", "ulysses", "product"])
def test_a_picture_alone_on_a_mesh(scheme):
    """Self-attention without any text beside it (its text comes by cross-attention)."""
    sizes = {"image": GRID.tokens}
    qkv = streams(sizes, seed=3)
    expected = oracle(qkv, ("image",), None, seen((GRID.tokens, None)))
    tokens = (Tokens("image"),)
    devices = {"ring": 4, "ulysses": 3, "product": 6}[scheme]
    split = Split.of(make_mesh(jax.devices()[:devices], context=devices), sizes)

    @jax.jit
    def sharded(*qkv):
        qkv = ({n: pad_axis(x, 1, split.padded(n, x.shape[1])) for n, x in part.items()} for part in qkv)
        out = attend(*qkv, (Call((KeySet(tokens, tokens),), ("scatter",)),), backend=scheme, split=split)
        return split.leave("image", out["image"])

    np.testing.assert_allclose(sharded(*qkv), expected["image"], atol=2e-5)


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "a", "b")])
def test_several_streams_with_lengths(order):
    """Two masked streams and a whole one, in any order, one of them empty for some samples."""
    sizes = {"a": 4, "b": 7, "c": 3}
    lengths = {"a": np.array([4, 0, 1, 0], np.int32), "b": np.array([0, 7, 3, 1], np.int32)}
    qkv = streams(sizes, seed=1)
    tokens = tuple(Tokens(n) for n in order)
    calls = bind((Call((KeySet(tokens, tokens),), ("scatter",) * 3),), {}, lengths)
    out = attend(*qkv, calls)
    expected = oracle(qkv, order, None, seen(*((sizes[n], lengths.get(n)) for n in order)))
    for name, value in expected.items():
        np.testing.assert_allclose(out[name], value, atol=1e-5)


def test_gradients_pass_by_the_padding():
    (q, k, v), calls, _ = dense_case()

    def loss(k, v):
        return sum(jnp.square(x[:, :3]).sum() for x in attend(q, k, v, calls).values())

    for grown in jax.jit(jax.grad(loss, (0, 1)))(k, v):
        hidden = np.arange(TEXT)[None] >= LENGTHS[:, None]
        assert np.all(np.asarray(grown["text"])[hidden] == 0)
        assert np.abs(np.asarray(grown["text"])[~hidden]).min(-1).max() > 0


def crpa(text):
    mask = np.zeros((4, 4), bool)
    mask[:2, 2:] = True
    masks = (jnp.stack([jnp.asarray(mask), jnp.asarray(mask.T), jnp.asarray(~mask), jnp.asarray(mask)]),)
    layout = Mixed.fitting(masks, (8, 8))
    return layout, arrange(masks, layout), RopeSpec(dims=(4, 6, 6), trained=(4, 4)).grid(8, 8, text)


def scalediff(text, path="windows"):
    return Neighborhood(window=(4, 4), path=path), None, RopeSpec(dims=(4, 6, 6), trained=(4, 4)).grid(8, 8, text)


@pytest.mark.parametrize("case", [crpa, scalediff, partial(scalediff, path="blocks")])
def test_a_masked_prompt_is_a_shorter_one(case):
    """Under a layout every sample of the batch is as it would be alone with its own prompt and no padding."""

    def run(text, lengths, q, k, v):
        layout, content, grid = case(text)
        ropes = {name: dict.fromkeys(("text", "image"), plain(g)) for name, g in layout.grids(grid).items()}
        q, k, v = (ordered(layout, grid, x) for x in (q, k, v))
        return attend(q, k, v, bind(layout.calls(grid, content), ropes, lengths))

    image = case(TEXT)[0].tokens if case is crpa else 64
    q, k, v = streams({"text": TEXT, "image": image}, seed=2)
    out = run(TEXT, {"text": jnp.asarray(LENGTHS)}, q, k, v)
    for sample, length in enumerate(LENGTHS):
        if not length:
            continue  # no text at all is another set of streams
        short = ({"text": x["text"][:, :length], "image": x["image"]} for x in (q, k, v))
        alone = run(int(length), None, *short)
        np.testing.assert_allclose(out["image"][sample], alone["image"][sample], atol=1e-5)
        np.testing.assert_allclose(out["text"][sample, :length], alone["text"][sample], atol=1e-5)


def test_what_cannot_be_masked_is_refused():
    qkv = streams({"text": 4, "image": 8})
    text, image = Tokens("text"), Tokens("image")
    lengths = {"text": jnp.asarray([4, 1, 2, 3], jnp.int32)}
    blocks = from_mask(np.ones((12, 12), bool), 4, 4)
    calls = bind((Call((KeySet((text, image), (text, image), blocks),), ("scatter",) * 2),), {}, lengths)
    with pytest.raises(ValueError, match=r"keys text, image: a block map.*only the last stream may have a length"):
        attend(*qkv, calls)
    calls = bind((Call((KeySet((text, image), (text, image), causal=True),), ("scatter",) * 2),), {}, lengths)
    with pytest.raises(ValueError, match=r"causal attention counts them in order"):
        attend(*qkv, calls)
    last = bind((Call((KeySet((image, text), (image, text), blocks),), ("scatter",) * 2),), {}, lengths)
    expected = oracle(qkv, ("image", "text"), None, seen((8, None), (4, np.array([4, 1, 2, 3]))))
    np.testing.assert_allclose(attend(*qkv, last)["image"], expected["image"], atol=1e-5)
    picked = Tokens("text", index=np.array([0, 2], np.int32))
    with pytest.raises(ValueError, match=r"stream 'text' has lengths per sample.*only whole and in order"):
        bind((Call((KeySet((image,), (picked,)),), ("scatter",)),), {}, lengths)

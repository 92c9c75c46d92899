"""`attend` on meshes of eight fake devices against `attend` on one: schemes, and layouts that are not dense."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.attention import attend
from sega_jax.attention.context.route import choose_scheme, split_backend
from sega_jax.layouts.blocks import from_mask
from sega_jax.layouts.streams import Call, KeySet, Table, Tokens
from sega_jax.sharding.mesh import make_mesh
from sega_jax.sharding.split import Split, pad_axis

TEXT, IMAGE, LOW, HEADS, WIDTH, BATCH = 5, 21, 6, 6, 8, 2
RNG = np.random.default_rng(0)


def table(tokens, batch=1, groups=1, heads=1):
    angle = RNG.uniform(0, 3, (batch, groups, tokens, heads, WIDTH // 2))
    magnitude = RNG.uniform(0.9, 1.2, (batch, 1, 1, heads, WIDTH // 2))
    return Table(*(jnp.asarray(x, jnp.float32) for x in (np.cos(angle), np.sin(angle), magnitude)))


def dense():
    tokens = Tokens("text", table=table(TEXT)), Tokens("image", table=table(IMAGE, batch=BATCH, heads=HEADS))
    return (Call((KeySet(tokens, tokens),), ("scatter", "scatter")),)


def windows():
    """Overlapping windows of the image with keys of their own, averaged text; a second key set merged in."""
    index = np.stack([np.arange(s, s + 9) for s in (0, 6, 12)]).astype(np.int32)[None]
    index[0, 2, 7:] = IMAGE  # padding
    asks = Tokens("text", table=table(TEXT, groups=3)), Tokens("image", index=index, table=table(9, groups=3))
    seen = asks[0], replace(asks[1], length=np.asarray([[9, 5, 7]], np.int32))
    local = KeySet(asks, seen)
    rest = KeySet(asks, (Tokens("low", table=table(LOW, batch=BATCH)),))
    others = Tokens("low", table=table(LOW, heads=HEADS))
    return (
        Call((local, rest), ("mean", "scatter")),
        Call((KeySet((others,), (others, Tokens("text"))),), ("scatter",)),
    )


def blocks():
    tokens = Tokens("text"), Tokens("image", table=table(IMAGE)), Tokens("low")
    total = TEXT + IMAGE + LOW
    mask = RNG.uniform(size=(total, total)) < 0.5
    mask[:, 0] = True
    return (Call((KeySet(tokens, tokens, from_mask(mask, 8, 8)),), ("scatter",) * 3),)


def causal():
    """Each stream by itself and from its first token on, image after text."""
    text, image = Tokens("text", table=table(TEXT)), Tokens("image", table=table(IMAGE, batch=BATCH))
    return (
        Call((KeySet((text,), (text,), causal=True),), ("scatter",)),
        Call((KeySet((image,), (text,)), KeySet((image,), (image,), causal=True)), ("scatter",)),
    )


LENGTHS = {"text": TEXT, "image": IMAGE, "low": LOW}


def compare(calls, backend="auto", kv_heads=HEADS, **sizes):
    names = ("text", "image") if any(calls is two for two in (DENSE, GROUPED, CAUSAL)) else tuple(LENGTHS)
    q, k, v = (
        {n: jnp.asarray(RNG.standard_normal((BATCH, LENGTHS[n], heads, WIDTH)), jnp.float32) for n in names}
        for heads in (HEADS, kv_heads, kv_heads)
    )
    split = Split.of(make_mesh(jax.devices()[: np.prod(list(sizes.values()))], **sizes),
                     {n: LENGTHS[n] for n in names if n != "text"})  # fmt: skip

    @jax.jit
    def sharded(q, k, v):
        q, k, v = ({n: pad_axis(x, 1, split.padded(n, x.shape[1])) for n, x in part.items()} for part in (q, k, v))
        out = attend(q, k, v, calls, backend=backend, split=split)
        return {n: split.leave(n, x) for n, x in out.items()}

    got, expected = sharded(q, k, v), attend(q, k, v, calls)
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(got[name]), np.asarray(value), atol=2e-5)


DENSE, WINDOWS, BLOCKS, CAUSAL = dense(), windows(), blocks(), causal()
GROUPED = (Call((KeySet(*2 * ((Tokens("text", table=table(TEXT)), Tokens("image", table=table(IMAGE))),)),),
                ("scatter", "scatter")),)  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        ("auto", {"context": 2, "tensor": 2, "data": 2}),  # 3 heads for 2 devices: ring
        ("auto", {"context": 4}),  # 6 heads for 4 devices: product
        ("auto", {"context": 3, "tensor": 2}),  # 3 for 3: Ulysses
        ("ring+xla", {"context": 8}),
        ("ulysses", {"context": 4}),  # padded heads
        ("auto", {"data": 2, "tensor": 3}),
    ],
)
def test_dense(backend, sizes):
    compare(DENSE, backend, **sizes)


@pytest.mark.parametrize("calls", [WINDOWS, BLOCKS], ids=["windows", "blocks"])
@pytest.mark.parametrize("sizes", [{"context": 2, "tensor": 2, "data": 2}, {"context": 4}, {"data": 2, "tensor": 3}])
def test_any_layout_goes_by_heads(calls, sizes):
    compare(calls, **sizes)


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        ("auto", {"context": 2, "tensor": 3}),  # one key head per shard for 2 devices: ring
        ("auto", {"context": 3, "tensor": 1, "data": 2}),  # 3 key heads for 3: Ulysses
        ("ulysses", {"context": 2, "data": 2}),  # padded key heads, and query heads with them
        ("product", {"context": 6}),  # 3 of 6
    ],
)
def test_grouped_keys(backend, sizes):
    compare(GROUPED, backend, kv_heads=3, **sizes)


@pytest.mark.parametrize("kv_heads", [HEADS, 3])
def test_causal_and_grouped_by_heads(kv_heads):
    compare(CAUSAL, kv_heads=kv_heads, context=2, data=2)
    with pytest.raises(ValueError, match=r"'ring' serves dense attention only.*causal attention"):
        compare(CAUSAL, "ring", kv_heads=kv_heads, context=2)


def test_the_tensor_axis_divides_the_key_heads():
    with pytest.raises(ValueError, match=r"tensor=2 does not divide 3 attention heads \(of keys\)"):
        compare(GROUPED, kv_heads=3, tensor=2)


def test_the_choice_of_scheme():
    assert choose_scheme(24, 8, joint=True) == ("ulysses", 8)
    assert choose_scheme(24, 16, joint=True) == ("product", 8)
    assert choose_scheme(24, 5, joint=True) == ("ulysses", 5)  # one head in 25 is padding
    assert choose_scheme(3, 8, joint=True) == ("ring", 1)
    assert choose_scheme(3, 2, joint=False) == ("ulysses", 2)
    assert choose_scheme(24, 8, joint=True, scheme="ring") == ("ring", 1)
    for arguments, message in [
        ((3, 8, False, "auto"), "3 heads per tensor shard cannot occupy 8"),
        ((24, 8, False, "ring"), "dense attention only"),
        ((3, 8, True, "product"), "have none: use 'ring'"),
        ((24, 1, True, "ring"), "has one device"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose_scheme(*arguments[:2], joint=arguments[2], scheme=arguments[3])


def test_names():
    assert split_backend("xla") == ("auto", "xla")
    assert split_backend("ring") == ("ring", "auto")
    assert split_backend("product+splash") == ("product", "splash")
    with pytest.raises(ValueError, match="'star' is unknown"):
        split_backend("star+xla")
    x = {"image": jnp.ones((1, 4, 2, 8))}
    with pytest.raises(ValueError, match="needs a mesh"):
        attend(x, x, x, (), backend="ring")

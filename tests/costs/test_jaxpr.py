"""Counts against closed forms, and against one another when a model grows."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sega_jax import positional as pe
from sega_jax.attention import attention
from sega_jax.attention.context import Sharded, ring, ulysses
from sega_jax.attention.kernels import Request, registered
from sega_jax.attention.kernels.contract import cost
from sega_jax.costs import jaxpr
from sega_jax.costs.closed_form import traffic
from sega_jax.layouts.blocks import from_blocks
from sega_jax.layouts.dense import Dense
from sega_jax.models.abstract import build_abstract
from sega_jax.models.flux import Flux, FluxConfig
from sega_jax.sampling.denoise import predict
from tests.tiny import flux_conditioning


def abstract(shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def step(config: FluxConfig, side: int, positional: str = "none", text: int = 512) -> jaxpr.Counts:
    """Counts of one denoising step of a picture of ``side`` squared pixels."""
    graphdef, params = nnx.split(build_abstract(lambda rngs: Flux(config, rngs=rngs, dtype=jnp.bfloat16)))
    grid = config.rope_spec().grid_for_pixels(side, side, text)
    options = {"graphdef": graphdef, "layout": Dense(), "grid": grid, "dtype": "bfloat16"}
    conditioning = flux_conditioning(
        abstract((1, text, config.text_dim)), abstract((1, config.pooled_dim)), abstract((), "float32")
    )
    latents = abstract((1, side // 8, side // 8, config.in_channels // 4), "float32")
    method = pe.traceable(pe.get(positional))
    return jaxpr.count(
        lambda p, x, s, c, i: predict(p, method, x, s, c, i, None, None, **options),
        params, latents, abstract((), "float32"), conditioning, abstract((), "int32"),
    )  # fmt: skip


def flux_flops(tokens: int, width: int = 3072, blocks: int = 57) -> int:
    """A block multiplies every token with 12 width^2 weights, and all tokens with each other, twice."""
    return blocks * (24 * tokens * width**2 + 4 * tokens**2 * width)


@pytest.mark.parametrize("positional", ["none", "sega"])
@pytest.mark.parametrize("side", [1024, 6144])
def test_flux_dev_matches_the_closed_form(side, positional):
    """Published sizes, never allocated.  Within the 3 % that embedders, modulation and the spectrum take."""
    counts = step(FluxConfig.dev(), side, positional)
    assert counts.flops == pytest.approx(flux_flops((side // 16) ** 2 + 512), rel=0.03)
    assert not counts.notes


def test_doubling_the_layers_doubles_what_the_layers_do():
    def tiny(layers: int) -> jaxpr.Counts:
        config = FluxConfig(double_layers=layers, single_layers=2 * layers, heads=2, text_dim=32, pooled_dim=16)
        return step(config, 256, text=8)

    one, two, four = tiny(1), tiny(2), tiny(4)
    assert one.flops > 0
    assert four.flops - two.flops == 2 * (two.flops - one.flops)
    assert four.bytes - two.bytes == 2 * (two.bytes - one.bytes)


def test_loops_branches_and_convolutions():
    x, w = abstract((8, 16), "float32"), abstract((16, 16), "float32")
    product = 2 * 8 * 16 * 16

    def scanned(x, w):
        return jax.lax.scan(lambda c, _: (jax.checkpoint(lambda y: jnp.tanh(y @ w))(c), None), x, None, length=5)[0]

    assert jaxpr.count(scanned, x, w) == jaxpr.Counts(5 * product, 5 * 4 * (8 * 16 + 16 * 16 + 8 * 16))

    def branched(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

    assert jaxpr.count(branched, x, w).flops == product
    assert "branch" in jaxpr.count(branched, x, w).notes[0]

    def looped(x, w):
        return jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ w, x)

    assert jaxpr.count(looped, x, w).flops == product
    assert "once" in jaxpr.count(looped, x, w).notes[0]

    def convolved(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    counts = jaxpr.count(convolved, abstract((1, 10, 12, 4), "float32"), abstract((3, 3, 4, 6), "float32"))
    assert counts.flops == 2 * 10 * 12 * 6 * 9 * 4


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_attention_counts_its_pairs_whatever_the_kernel(backend):
    q, k = abstract((2, 300, 3, 8)), abstract((2, 200, 3, 8))
    counts = jaxpr.count(partial(attention, backend=backend), q, k, k)
    assert counts.flops == 4 * 2 * 3 * 300 * 200 * 8
    grouped = abstract((2, 200, 1, 8))
    assert jaxpr.count(partial(attention, backend=backend), q, grouped, grouped).flops == counts.flops


def test_causal_attention_counts_what_is_up_to_the_diagonal():
    q, k = abstract((2, 300, 3, 8)), abstract((2, 200, 1, 8))
    counts = jaxpr.count(partial(attention, backend="xla", causal=True), q, k, k)
    assert counts.flops == 4 * 2 * 3 * int(np.tril(np.ones((300, 200))).sum()) * 8


def test_a_block_map_counts_the_blocks_it_visits():
    pattern = np.full((4, 4), -1)
    pattern[:, 0], pattern[2, 3] = 0, 0
    blocks = from_blocks(pattern, np.zeros((0, 64, 64), bool), 64, 64)
    q = abstract((1, 256, 2, 8), "float32")
    known = cost(Request(q, q, q, 1.0, None, blocks))
    assert known.flops == 4 * 2 * 8 * 5 * 64 * 64
    counted = jaxpr.count(lambda q, k, v: attention(q, k, v, block_map=blocks, backend="xla"), q, q, q)
    assert counted.flops == known.flops


# -- collectives ---------------------------------------------------------------------------------------------------

TEXT, IMAGE, HEADS, WIDTH, DEVICES = 4, 64, 8, 16, 4
STREAM = IMAGE // DEVICES * HEADS * WIDTH * 4  # float32 bytes of a device's queries, keys or values


def sharded(scheme, layers: int = 1):
    mesh = jax.make_mesh((DEVICES,), ("context",), devices=jax.devices()[:DEVICES],
                         axis_types=(jax.sharding.AxisType.Auto,))  # fmt: skip
    spec = Sharded(P(), P(None, "context"))
    run = partial(scheme, axis="context", run=registered()["xla"].run, scale=1.0, total=IMAGE)

    def stacked(q, k, v):
        def layer(q, _):  # keys and values of its own, which could otherwise be exchanged once for all layers
            return run(q, jax.tree.map(jnp.add, k, q), jax.tree.map(jnp.subtract, v, q)), None

        return jax.lax.scan(layer, q, None, length=layers)[0]

    mapped = jax.shard_map(stacked, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    one = [
        jax.ShapeDtypeStruct((1, n, HEADS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, s))
        for n, s in ((TEXT, P()), (IMAGE, P(None, "context")))
    ]
    return mapped, (Sharded(*one),) * 3


def closed_form(scheme) -> dict[str, int]:
    """Bytes out of one device, for one attention."""
    text = TEXT * HEADS * WIDTH * 4
    if scheme is ulysses:  # queries, keys, values to heads, the output back; the text's output to everyone
        return {"all-to-all": 4 * STREAM * 3 // 4, "all-gather": text // DEVICES * 3}
    # keys and values once around; text rows: sums, weights and maxima of its partial results
    return {"collective-permute": 2 * DEVICES * STREAM, "all-reduce": 2 * (text + 2 * TEXT * HEADS * 4) * 3 // 4}


@pytest.mark.parametrize("scheme", [ulysses, ring])
def test_collectives_match_the_closed_form_and_the_compiled_program(scheme):
    mapped, arguments = sharded(scheme)
    counts = jaxpr.count(mapped, *arguments)
    assert counts.collectives == {kind: DEVICES * sent for kind, sent in closed_form(scheme).items()}
    text = jax.jit(mapped).lower(*arguments).compile().as_text()
    compiled = sum(jaxpr.hlo_collectives(text, DEVICES).values())
    assert compiled == pytest.approx(sum(closed_form(scheme).values()), rel=0.2)


@pytest.mark.parametrize("scheme", ["ulysses", "ring"])
@pytest.mark.parametrize("kv_heads", [8, 4])
def test_a_plan_counts_the_keys_that_travel(scheme, kv_heads):
    """The closed form of a plan against the program's own collectives, images alone, with grouped keys and without."""
    mesh = jax.make_mesh((DEVICES,), ("context",), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:DEVICES])  # fmt: skip
    spec = Sharded(P(), P(None, "context"))
    options = {"axis": "context", "run": registered()["xla"].run, "scale": 1.0, "total": IMAGE}
    run = partial({"ulysses": ulysses, "ring": ring}[scheme], **options)
    q, k = (Sharded(abstract((1, 1, h, WIDTH), "float32"), abstract((1, IMAGE, h, WIDTH), "float32"))
            for h in (HEADS, kv_heads))  # fmt: skip
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    counted = jaxpr.count(mapped, q, k, k).collectives
    config = SimpleNamespace(width=HEADS * WIDTH, heads=HEADS, blocks=1, reductions=1)
    planned = traffic(config, IMAGE, 0, rows=1, sizes={"data": 1, "context": DEVICES, "tensor": 1}, number=4,
                      weights=0, scheme=scheme, kv_heads=kv_heads)  # fmt: skip
    kind = {"ulysses": "all-to-all", "ring": "collective-permute"}[scheme]
    assert counted[kind] == DEVICES * planned["context"]


@pytest.mark.parametrize("scheme", [ulysses, ring])
def test_doubling_the_layers_doubles_the_collectives(scheme):
    one, two = (sharded(scheme, layers) for layers in (3, 6))
    assert (2 * jaxpr.count(one[0], *one[1]).collective_bytes
            == jaxpr.count(two[0], *two[1]).collective_bytes)  # fmt: skip
    texts = [jax.jit(f).lower(*arguments).compile().as_text() for f, arguments in (one, two)]
    single, double = (jaxpr.hlo_collectives(text, DEVICES) for text in texts)
    assert {kind: 2 * sent for kind, sent in single.items()} == double


def test_gathers_of_the_partitioner_are_seen_in_the_compiled_program():
    mesh = jax.make_mesh((DEVICES,), ("context",), devices=jax.devices()[:DEVICES],
                         axis_types=(jax.sharding.AxisType.Auto,))  # fmt: skip
    weights = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "context")))
    x = jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=NamedSharding(mesh, P("context")))

    def layers(x, weights):
        def one(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None

        return jax.lax.scan(one, x, weights)[0]

    text = jax.jit(layers).lower(x, weights).compile().as_text()
    assert jaxpr.hlo_collectives(text, DEVICES) == {"all-gather": 6 * 64 * 64 * 4 * 3 // 4}


def test_asynchronous_and_nested_collectives_of_hlo():
    text = """HloModule m, is_scheduled=true

%gather (p: bf16[8,4]) -> bf16[32,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %g = bf16[32,4]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%body (c: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %c = (s32[], bf16[8,4]{1,0}) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%c), index=1
  %s = ((bf16[8,4]{1,0}), bf16[32,4]{1,0}, s32[]) async-start(%x), calls=%gather
  %d = bf16[32,4]{1,0} async-done(%s)
  %q = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %r = bf16[8,4]{1,0} collective-permute-done(%q)
  ROOT %t = (s32[], bf16[8,4]{1,0}) tuple(%x, %x)
}

%condition (c: (s32[], bf16[8,4])) -> pred[] {
  ROOT %p = pred[] constant(true)
}

%counts (c: (s32[], bf16[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  ROOT %p = pred[] compare(%i, %limit), direction=LT
}

%other (c: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %m = bf16[8,64]{1,0:T(8,128)} all-to-all(%x), replica_groups=mesh['data'=2,'context'=4] {'context'}, dimensions={0}
  ROOT %t = (s32[], bf16[8,4]{1,0}) tuple(%x, %x)
}

ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %w = (s32[], bf16[8,4]) while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %v = (s32[], bf16[8,4]) while(%a), condition=%counts, body=%other
  %u = f32[16]{0} all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%condition
  ROOT %o = bf16[8,4]{1,0} get-tuple-element(%w), index=1
}
"""
    assert jaxpr.hlo_collectives(text, 8) == {
        "all-gather": 5 * 64 * 3,  # of 64 bytes among 4
        "collective-permute": 5 * 64,
        "all-to-all": 7 * 1024 * 3 // 4,
        "all-reduce": 64,  # 2 (n - 1) / n of 64 bytes among 2
    }

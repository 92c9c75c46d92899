"""int8 weights: what is stored, what is computed with it, and that the whole is nowhere held in full."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from converters.convert import convert
from converters.keymap import Slot
from converters.lora import Factors, Lora, express
from sega_jax import positional as pe
from sega_jax.families.registry import load_parts
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.streams import Stream, bind
from sega_jax.models import adapters as lowrank
from sega_jax.models.abstract import axes, build_abstract, initialize, parameters
from sega_jax.models.flux import Flux, FluxConfig
from sega_jax.models.layers import Linear, stack
from sega_jax.models.quantized import check_weights, quantize, quantized
from sega_jax.positional.rope import plain
from sega_jax.sampling.denoise import predict
from sega_jax.weights.hub import resolve
from sega_jax.weights.loras import lora_specs
from tests.tiny import flux_conditioning, step_inputs

TINY = FluxConfig(8, 2, 2, 2, 16, 12, 10, True, (4, 6, 6))
BLOCKS = ("double.", "single.")


def is_matrix(path):
    return path.startswith(BLOCKS) and path.endswith(".kernel")


def rounded(kernel):
    """The oracle: int8 values and scales of a kernel [..., in, out], in float64; and what they stand for."""
    exact = np.asarray(kernel, np.float64)
    scale = np.abs(exact).max(-2, keepdims=True) / 127
    scale[scale == 0] = 1
    values = np.round(exact / scale)
    return values, scale, values * scale


def noisy(seed=0):
    model = initialize(lambda rngs: Flux(TINY, rngs=rngs))
    random = np.random.default_rng(seed)
    for path, param in parameters(model).items():  # adaLN-Zero starts as the identity; wake everything up
        value = np.asarray(param[...]) + 0.1 * random.standard_normal(param.shape).astype(np.float32)
        if is_matrix(path):  # nothing halfway between two steps, where float32 and float64 round differently
            scale = rounded(value)[1]
            halfway = np.abs(np.abs(value / scale) % 1 - 0.5) < 1e-3
            value = np.where(halfway, value + 0.01 * scale, value).astype(np.float32)
        param.set_value(jnp.asarray(value))
    return model


def dequantised():
    """The model with the oracle's kernels, in float32."""
    model = noisy()
    for path, param in parameters(model).items():
        if is_matrix(path):
            param.set_value(jnp.asarray(rounded(param[...])[2], jnp.float32))
    return model


def velocity(model, dtype=jnp.float32, streams=(Stream("text", "text"), Stream("image", "image"))):
    random = np.random.default_rng(0)
    grid = TINY.rope_spec().grid(3, 4, 5)
    calls = bind(Dense().calls(grid), {"image": {"text": plain(grid), "image": plain(grid)}})
    inputs = {
        "text": jnp.asarray(random.standard_normal((2, 5, 12)), dtype),
        "image": jnp.asarray(random.standard_normal((2, grid.tokens, 8)), dtype),
    }
    pooled = jnp.asarray(random.standard_normal((2, 10)), dtype)
    out = model(step_inputs(inputs, jnp.full((2,), 0.7), pooled, jnp.full((2,), 3.5)), calls, streams=streams)
    return np.asarray(out["image"], np.float32)


def distance(got, expected):
    """Root mean square of the difference, relative to that of what is expected."""
    return np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))


# -- matrices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("turn", [False, True], ids=["as stored", "transposed"])
def test_a_matrix_is_within_half_a_step(dtype, turn):
    kernel = np.random.default_rng(0).standard_normal((24, 40)).astype(dtype)
    kernel[:, 3] = 0
    kernel[:, 4] *= np.asarray(2.0**-10, dtype)
    kernel[5, 6] = 100
    kernel = np.ascontiguousarray(kernel.T).T if turn else kernel
    values, scale = quantize(kernel)
    assert (values.dtype, values.shape, scale.dtype, scale.shape) == (np.int8, (24, 40), np.float32, (40,))
    exact = kernel.astype(np.float64)
    error = np.abs(values * scale.astype(np.float64) - exact)
    assert np.all(error <= 0.5 * scale + 2.0**-22 * np.abs(exact))  # float32's own rounding
    assert error.max() > 0.3 * scale.max()  # the bound is close
    np.testing.assert_allclose(scale, rounded(exact)[1][0], rtol=1e-6)
    assert np.all(values[:, 3] == 0)
    again, same = quantize(values * scale)
    np.testing.assert_array_equal(again, values)  # what is rounded once stays as it is
    np.testing.assert_allclose(same, scale, rtol=1e-6)


def test_a_checkpoint_is_quantised_as_it_is_read():
    """Exact float32 scales of every matrix of the blocks; whatever else there is stays bit for bit."""
    nano = resolve("nano")
    full, small = (load_parts(nano, dtype="float32", weights=weights) for weights in ("full", "int8"))
    full, small = parameters_of(full), parameters_of(small)
    matrices = [path for path in full if is_matrix(path)]
    assert len(matrices) == 2 * 7 + 6  # modulation, q, k, v, output and two of the MLP; modulation, q, k, v and two
    scales = {path: path.removesuffix("kernel") + "kernel_scale" for path in matrices}
    assert set(small) == set(full) | set(scales.values())
    for path, exact in full.items():
        exact = np.asarray(exact[...])
        if path not in scales:
            np.testing.assert_array_equal(small[path][...], exact)
            continue
        values, scale = np.asarray(small[path][...]), np.asarray(small[scales[path]][...])
        assert values.dtype == np.int8
        assert scale.dtype == np.float32
        error = np.abs(values * scale[:, None, :].astype(np.float64) - exact)
        assert np.all(error <= 0.5 * scale[:, None, :] + 2.0**-22 * np.abs(exact)), path
        assert axes(small[scales[path]]) == (axes(full[path])[0], axes(full[path])[2])


def test_a_lora_is_merged_before_rounding(tmp_path):
    random, nano = np.random.default_rng(0), resolve("nano")
    full = parameters_of(load_parts(nano, dtype="float32"))
    slot = Slot("single.attention.query.kernel", 1)
    _, into, out = full[slot.path].shape
    factors = Factors(
        random.standard_normal((2, into)).astype(np.float32), random.standard_normal((out, 2)).astype(np.float32)
    )
    file = tmp_path / "lora.safetensors"
    save_file(express(Lora({"transformer": {slot: factors}}, {}, "test"), "diffusers"), file)
    loras = lora_specs([(file, 0.5)])
    merged = np.asarray(parameters_of(load_parts(nano, dtype="float32", loras=loras))[slot.path][...])
    small = parameters_of(load_parts(nano, dtype="bfloat16", loras=loras, weights="int8"))
    scale = rounded(merged)[1]
    assert np.abs(merged - full[slot.path][...]).max() > 5 * scale.max()
    np.testing.assert_allclose(small[slot.path.replace("kernel", "kernel_scale")][...], scale[:, 0], rtol=1e-6)
    error = np.abs(np.asarray(small[slot.path][...]) * scale - merged)
    assert np.all(error <= 0.5 * scale + 2.0**-22 * np.abs(merged))  # bfloat16 did not round it first


def test_a_file_in_eight_bits_keeps_its_values(tmp_path):
    """What ComfyUI's int8 files hold is not rounded again."""
    nano, file = resolve("nano"), tmp_path / "int8.safetensors"
    convert(nano / "transformer", file, to="bfl", dtype="int8", progress=False)
    small = parameters_of(load_parts(nano, dtype="bfloat16", transformer=file, weights="int8"))
    stored = load_file(file)
    values, scale = (stored[f"single_blocks.1.linear2.{name}"] for name in ("weight", "weight_scale"))
    np.testing.assert_array_equal(small["single.out.kernel"][1], values.T)
    np.testing.assert_allclose(small["single.out.kernel_scale"][1], scale[:, 0], rtol=1e-6)


def parameters_of(parts):
    return parameters(nnx.merge(parts.transformer.graphdef, parts.transformer.params))


# -- products ----------------------------------------------------------------------------------------------------------


def test_velocity_is_that_of_the_rounded_kernels():
    """Rounding to int8 is all that is lost: equal to a float32 model of the kernels that the int8 ones stand for.

    Of the rounding itself: a weight's error is uniform within half a step of 1/127 of its channel's largest, here
    3 standard deviations, so a product's relative error is 3 / 127 / sqrt(12) = 0.7 %; through 4 blocks of 3 products
    in a row, 0.7 % sqrt(12) = 2.4 %.
    """
    full, small = velocity(noisy()), velocity(quantized(noisy()))
    np.testing.assert_allclose(small, velocity(dequantised()), atol=1e-5 * np.abs(full).max(), rtol=0)
    lost = distance(small, full)
    print(f"velocity under int8: relative error {lost:.2%}")
    assert 1e-4 < lost < 0.024


def test_of_parts_is_the_whole():
    class Holder(nnx.Module):
        def __init__(self, rngs):
            self.blocks = stack(lambda rngs: Linear(10, 6, rngs=rngs), 1, rngs)

    def first(holder):
        graphdef, params = nnx.split(holder.blocks)
        return nnx.merge(graphdef, jax.tree.map(lambda x: x[0], params))

    layer = first(quantized(initialize(Holder)))
    x = jax.random.normal(jax.random.key(0), (3, 10))
    expected = np.asarray(x, np.float64) @ rounded(first(initialize(Holder)).kernel[...])[2]
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    np.testing.assert_allclose(layer.of_parts(x[:, :4], x[:, 4:]), expected, atol=1e-5)
    narrow = layer(x.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), expected, atol=2.0**-6 * np.abs(expected).max())


def test_unmerged_adapters_ride_on_int8_kernels():
    """As Scale-DiT's LoRA does: the same change as on the rounded kernels in float32."""
    streams = (Stream("text", "text"), Stream("image", "image", adapter="all"))

    def adapted(model):
        adapters = lowrank.create(model, 2, jax.random.key(1))
        for change in adapters.layers().values():
            change.b.set_value(0.3 * jax.random.normal(jax.random.key(2), change.b.shape))
        return lowrank.attach(model, adapters)

    got = velocity(adapted(quantized(noisy())), streams=streams)
    expected = velocity(adapted(dequantised()), streams=streams)
    assert distance(expected, velocity(dequantised())) > 0.05
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_no_copy_of_the_weights_among_temporaries():
    """Four times the blocks: temporaries grow by less than one block's weights in the dtype of the run."""
    temporary, dtype = {}, "float32"
    for layers in (2, 8):
        config = dataclasses.replace(TINY, head_dim=96, rope_dims=(32, 32, 32), double_layers=1, single_layers=layers)
        module = build_abstract(lambda rngs, c=config: quantized(Flux(c, rngs=rngs)))
        graphdef, params = nnx.split(module)
        assert {x.dtype for path, x in parameters(module).items() if is_matrix(path)} == {jnp.dtype(jnp.int8)}
        kernels = [x for path, x in parameters(module).items() if is_matrix(path) and path.startswith("single")]
        block = sum(x.size // layers for x in kernels) * jnp.dtype(dtype).itemsize

        def array(*shape, dtype=jnp.float32):
            return jax.ShapeDtypeStruct(shape, dtype)

        conditioning = flux_conditioning(array(1, 4, 12, dtype=dtype), array(1, 10, dtype=dtype), array())
        compiled = predict.lower(
            params, pe.get("none"), array(1, 8, 8, 2), array(), conditioning, array(dtype=jnp.int32), None, None,
            graphdef=graphdef, layout=Dense(), grid=config.rope_spec((4, 4)).grid(4, 4, 4), dtype=dtype,
        ).compile()  # fmt: skip
        temporary[layers] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary[8] - temporary[2] < block


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_served_is_refused(monkeypatch):
    check_weights("int8")
    with pytest.raises(ValueError, match="weights='int4': expected 'full' or 'int8'"):
        check_weights("int4")
    monkeypatch.setitem(sys.modules, "qwix", None)
    check_weights("full")
    with pytest.raises(ValueError, match=r"pip install 'sega-jax\[quant\]'"):
        check_weights("int8")

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from converters.cover import check_cover
from converters.errors import CheckpointError, CoverageError
from converters.keymap import Row, expand
from converters.reading.sources import ArraySource, renamed
from sega_jax.models.abstract import axes, parameters
from sega_jax.models.layers import Linear, parameter, stack, zeros
from sega_jax.weights.load import assign, load

HIDDEN, MLP, LAYERS = 4, 6, 3
DIMS = {"hidden": HIDDEN, "mlp": MLP, "layers": LAYERS}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.query = Linear(HIDDEN, HIDDEN, bias=False, rngs=rngs)
        self.key = Linear(HIDDEN, HIDDEN, bias=False, rngs=rngs)
        self.up = Linear(HIDDEN, MLP, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.blocks = stack(Block, LAYERS, rngs)
        self.head = Linear(HIDDEN, 2, rngs=rngs)
        self.gain = parameter(rngs, zeros, (), (), jnp.float32)


ROWS = (
    Row(
        "layers.{i}.qk",
        ("blocks[{i}].query.kernel", "blocks[{i}].key.kernel"),
        ("2*hidden", "hidden"),
        ("transpose",),
        repeat="layers",
        sizes=("hidden", "hidden"),
    ),
    Row("layers.{i}.up.weight", "blocks[{i}].up.kernel", ("mlp", "hidden"), ("transpose",), repeat="layers"),
    Row("layers.{i}.up.bias", "blocks[{i}].up.bias", ("mlp",), repeat="layers"),
    Row("head.weight", "head.kernel", (2, "hidden"), ("transpose",)),
    Row("head.bias", "head.bias", (2,)),
    Row("gain", "gain", ()),
)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    shapes = {tensor.source: tensor.shape for tensor in expand(ROWS, DIMS)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def problems(tensors, rows=ROWS, dims=DIMS, build=Model):
    with pytest.raises(CoverageError) as error:
        load(build, rows, dims, ArraySource(tensors))
    return str(error.value).splitlines()


def test_every_tensor_lands_where_its_row_says(tensors):
    model = load(Model, ROWS, DIMS, ArraySource(tensors))
    for i in range(LAYERS):
        fused = tensors[f"layers.{i}.qk"]
        np.testing.assert_array_equal(model.blocks.query.kernel[...][i], fused[:HIDDEN].T)
        np.testing.assert_array_equal(model.blocks.key.kernel[...][i], fused[HIDDEN:].T)
        np.testing.assert_array_equal(model.blocks.up.kernel[...][i], tensors[f"layers.{i}.up.weight"].T)
        np.testing.assert_array_equal(model.blocks.up.bias[...][i], tensors[f"layers.{i}.up.bias"])
    np.testing.assert_array_equal(model.head.kernel[...], tensors["head.weight"].T)
    assert float(model.gain[...]) == tensors["gain"]
    x = np.ones(HIDDEN, np.float32)
    expected = tensors["head.weight"] @ x + tensors["head.bias"]
    np.testing.assert_allclose(model.head(jnp.asarray(x)), expected, rtol=1e-6)


def test_parameters_take_the_dtype_asked_for(tensors):
    """Rounded once, to nearest even, whatever the file holds."""
    model = load(Model, ROWS, DIMS, ArraySource(tensors), dtype=jnp.bfloat16)
    assert model.head.kernel[...].dtype == jnp.bfloat16
    expected = tensors["head.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(model.head.kernel[...]), expected)
    stored = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    model = load(Model, ROWS, DIMS, ArraySource(stored))
    assert model.head.kernel[...].dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(model.head.kernel[...]), expected.astype(np.float32))


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (300, 700), (513, 256), (1, 600), (0, 4)])
def test_assignment_of_transposed_matrices(shape, kind):
    values = np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)
    for given in (values, values.T, values[::2, 1:].T, values.T[1:]):
        target = np.full(given.shape, -1, kind)
        assign(target, given)
        np.testing.assert_array_equal(target, given.astype(kind))


def test_an_unreadable_tensor_is_an_error(tensors):
    class Broken(ArraySource):
        def view(self, name):
            if name == "layers.1.up.bias":
                raise CheckpointError("torn")
            return super().view(name)

    with pytest.raises(CheckpointError, match="torn"):
        load(Model, ROWS, DIMS, Broken(tensors))


def test_parameters_go_where_their_sharding_says(tensors):
    """The same values, cut as asked; each parameter is asked about once, with its logical axes."""
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Explicit,))
    seen = {}

    def shardings(path, param):
        assert path not in seen
        seen[path] = param.shape
        spec = jax.P(*("tensor" if name == "embed" else None for name in axes(param)))
        return None if path == "gain" else jax.sharding.NamedSharding(mesh, spec)

    plain, placed = (load(Model, ROWS, DIMS, ArraySource(tensors), **o) for o in ({}, {"shardings": shardings}))
    assert seen == {
        "blocks.query.kernel": (LAYERS, HIDDEN, HIDDEN),
        "blocks.key.kernel": (LAYERS, HIDDEN, HIDDEN),
        "blocks.up.kernel": (LAYERS, HIDDEN, MLP),
        "blocks.up.bias": (LAYERS, MLP),
        "head.kernel": (HIDDEN, 2),
        "head.bias": (2,),
        "gain": (),
    }
    for path, param in parameters(plain).items():
        np.testing.assert_array_equal(np.asarray(parameters(placed)[path][...]), np.asarray(param[...]))
    cut = parameters(placed)["blocks.up.kernel"][...]
    assert {shard.data.shape for shard in cut.addressable_shards} == {(LAYERS, HIDDEN // 2, MLP)}
    assert len(cut.sharding.device_set) == 2
    assert len(parameters(placed)["gain"][...].sharding.device_set) == 1


def test_all_problems_of_a_checkpoint_are_reported_together(tensors):
    del tensors["head.bias"]
    del tensors["layers.1.qk"]
    tensors["layers.2.up.weight"] = tensors["layers.2.up.weight"].T
    tensors["layers.3.qk"] = np.zeros((8, 4), np.float32)
    tensors["stranger"] = np.zeros(5, np.float32)
    title, *lines = problems(tensors)
    assert "does not match the model (5 problems)" in title
    assert {line.strip() for line in lines} == {
        "missing: head.bias (2,)",
        "missing: layers.1.qk (8, 4)",
        "wrong shape: layers.2.up.weight is (4, 6), expected (6, 4)",
        "not recognised: layers.3.qk (8, 4)",
        "not recognised: stranger (5,)",
    }


def test_faults_of_a_key_map_are_reported_together(tensors):
    rows = [row for row in ROWS if row.source not in ("gain", "head.bias", "layers.{i}.up.bias")]
    rows += [
        Row("head.weight", "head.kernel", (2, "hidden"), ("transpose",)),
        Row("head.bias", "head.offset", (2,)),
        Row("gain", "head.bias", ()),
        Row("layers.0.up.bias", "blocks[0].up.bias", ("mlp",)),
    ]
    lines = {line.strip() for line in problems(tensors, rows)[1:]}
    assert lines == {
        "used twice: head.weight",
        "filled twice: head.kernel",
        "key map names a parameter the model lacks: head.offset",
        "key map shape: head.bias takes (2,), the map gives ()",
        "not recognised: layers.1.up.bias (6,)",
        "not recognised: layers.2.up.bias (6,)",
        "filled in part: blocks.up.bias (3, 6), by slices [0]",
        "never filled: gain ()",
    }


def test_a_slice_filled_twice_is_reported(tensors):
    tensors["again"] = tensors["layers.1.up.bias"]
    rows = [*ROWS, Row("again", "blocks[1].up.bias", ("mlp",))]
    assert problems(tensors, rows)[1].strip() == "filled twice: blocks.up.bias[1]"


def test_a_configuration_with_other_counts_is_reported(tensors):
    lines = {line.strip() for line in problems(tensors, dims={**DIMS, "layers": 2})[1:]}
    assert "filled in part: blocks.query.kernel (3, 4, 4), by slices [0, 1]" in lines
    assert "not recognised: layers.2.qk (8, 4)" in lines
    lines = {line.strip() for line in problems(tensors, dims={**DIMS, "layers": 4})[1:]}
    assert "missing: layers.3.qk (8, 4)" in lines
    assert "filled in part: blocks.query.kernel (3, 4, 4), by slices [0, 1, 2, 3]" in lines


def test_long_lists_of_problems_are_cut(tensors):
    strangers = {f"stranger.{i:03}": np.zeros(1, np.float32) for i in range(100)}
    lines = problems({**tensors, **strangers})
    assert "(100 problems)" in lines[0]
    assert len(lines) == 42
    assert lines[-1].strip() == "... and 60 more"


def test_a_stack_without_layers_needs_nothing():
    check_cover([], ArraySource({}), {"single.kernel": (0, 4, 4)})
    with pytest.raises(CoverageError, match="never filled: gain"):
        check_cover([], ArraySource({}), {"gain": ()})


def rename(name):
    return None if name == "position_ids" else {"head.offset": "head.bias"}.get(name, name.removeprefix("model."))


@pytest.mark.parametrize("alias", ["head.bias", "head.offset", "model.head.bias"])
def test_declared_names_are_one_tensor(tensors, alias):
    expected = tensors["head.bias"].copy()
    source = {f"model.{name}": tensor for name, tensor in tensors.items() if name != "head.bias"}
    source[alias] = expected
    source["position_ids"] = np.arange(5)
    model = load(Model, ROWS, DIMS, renamed(ArraySource(source), rename))
    np.testing.assert_array_equal(model.head.bias[...], expected)
    tensors["head.offset"] = expected.copy()  # under two names, equal
    model = load(Model, ROWS, DIMS, renamed(ArraySource(tensors), rename))
    np.testing.assert_array_equal(model.head.bias[...], expected)


def test_declared_names_do_not_loosen_the_cover(tensors):
    source = renamed(ArraySource({**tensors, "model.stranger": np.zeros(1)}), rename)
    with pytest.raises(CoverageError, match="not recognised: stranger"):
        load(Model, ROWS, DIMS, source)


def test_names_of_one_tensor_that_differ_are_refused(tensors):
    tensors["head.offset"] = tensors["head.bias"] + 1
    with pytest.raises(CheckpointError, match=r"head\.bias and head\.offset are two names of one tensor"):
        load(Model, ROWS, DIMS, renamed(ArraySource(tensors), rename))

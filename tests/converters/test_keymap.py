import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.keymap import OPERATIONS, Row, Slot, canonical, evaluate, expand

DIMS = {"hidden": 6, "mlp": 4, "layers": 3, "guidance": 0}


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(7, 7), ("hidden", 6), ("3*hidden + mlp", 22), ("hidden//2 - 1", 2), ("(hidden + mlp)*2", 20), ("12", 12)],
)
def test_sizes(size, expected):
    assert evaluate(size, DIMS) == expected


@pytest.mark.parametrize("size", ["hidden**2", "hidden/2", "abs(hidden)", "hidden.real", "1.5", "-hidden"])
def test_sizes_are_not_programs(size):
    with pytest.raises(ValueError, match="only names, integers"):
        evaluate(size, DIMS)


@pytest.mark.parametrize(
    ("op", "shape"),
    [("transpose", (3, 5)), ("conv", (4, 3, 2, 5)), ("squeeze_conv", (4, 3, 1, 1)), ("swap_halves", (6, 2))],
)
def test_operations_invert_and_foretell_their_shape(op, shape):
    forward, backward, foretell = OPERATIONS[op]
    source = random(shape)
    target = forward(source)
    assert target.shape == foretell(shape)
    np.testing.assert_array_equal(backward(target), source)


def test_every_operation_is_covered_above():
    assert set(OPERATIONS) == {"transpose", "conv", "squeeze_conv", "swap_halves"}


def test_operations_mean_what_models_expect():
    kernel = random((5, 3))
    np.testing.assert_allclose(random(3, 1) @ OPERATIONS["transpose"][0](kernel), kernel @ random(3, 1))
    convolution = random((4, 3, 2, 5))
    assert OPERATIONS["conv"][0](convolution)[1, 4, 2, 3] == convolution[3, 2, 1, 4]
    pointwise = random((4, 3, 1, 1))
    assert OPERATIONS["squeeze_conv"][0](pointwise)[2, 3] == pointwise[3, 2, 0, 0]
    np.testing.assert_array_equal(OPERATIONS["swap_halves"][0](np.arange(6)), [3, 4, 5, 0, 1, 2])


def test_rows_expand_over_their_repeat_count():
    rows = [
        Row("embed.weight", "embed.table", (10, "hidden")),
        Row("block.{i}.w", "blocks[{i}].kernel", ("hidden", "mlp"), ("transpose",), repeat="layers"),
        Row("mid.{i}.b", "mid.{i}.bias", ("mlp",), repeat="layers"),
    ]
    tensors = list(expand(rows, DIMS))
    assert [t.source for t in tensors] == [
        "embed.weight",
        *(f"block.{i}.w" for i in range(3)),
        *(f"mid.{i}.b" for i in range(3)),
    ]
    assert [t.slots for t in tensors[1:4]] == [(Slot("blocks.kernel", i),) for i in range(3)]
    assert [t.slots for t in tensors[4:]] == [(Slot(f"mid.{i}.bias"),) for i in range(3)]
    assert tensors[0].shape == (10, 6)
    assert tensors[1].piece_shapes() == [(4, 6)]


def test_optional_rows_follow_their_count():
    row = Row("guidance.weight", "guidance.kernel", ("hidden",), optional="guidance")
    assert list(expand([row], DIMS)) == []
    assert len(list(expand([row], {**DIMS, "guidance": 1}))) == 1


SPLIT = Row(
    "qkv_mlp.{i}",
    ("blocks[{i}].q", "blocks[{i}].k", "blocks[{i}].v", "blocks[{i}].mlp"),
    ("3*hidden + mlp", 5),
    ("transpose",),
    repeat="layers",
    sizes=("hidden", "hidden", "hidden", "mlp"),
)


def test_split_rows_cut_the_first_axis_in_order():
    tensor = list(expand([SPLIT], DIMS))[1]
    source = random((22, 5))
    q, k, v, mlp = tensor.pieces(source)
    np.testing.assert_array_equal(q, source[:6].T)
    np.testing.assert_array_equal(k, source[6:12].T)
    np.testing.assert_array_equal(v, source[12:18].T)
    np.testing.assert_array_equal(mlp, source[18:].T)
    assert tensor.piece_shapes() == [(5, 6), (5, 6), (5, 6), (5, 4)]
    assert tensor.slots[3] == Slot("blocks.mlp", 1)


@pytest.mark.parametrize(
    "row",
    [
        Row("w", ("a", "b"), (10,), sizes=(4, 5)),  # do not add up
        Row("w", ("a", "b"), (10,)),  # sizes missing
        Row("w", "a", (10,), sizes=(10,)),  # nothing to split
    ],
)
def test_split_rows_must_add_up(row):
    with pytest.raises(ValueError, match=r"row 'w'.*do not make up"):
        list(expand([row], DIMS))


@given(
    pieces=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    width=st.integers(1, 5),
    ops=st.lists(st.sampled_from(["transpose", "swap_halves"]), max_size=3),
)
def test_assembling_inverts_taking_apart(pieces, width, ops):
    """Halves are swapped along the current first axis, so sizes are kept even."""
    sizes = tuple(2 * piece for piece in pieces)
    many = len(sizes) > 1
    row = Row("w", tuple(f"t{i}" for i in range(len(sizes))) if many else "t", (sum(sizes), 2 * width), tuple(ops))
    row = Row(row.source, row.targets, row.shape, row.ops, sizes=sizes if many else ())
    (tensor,) = expand([row], {})
    source = random(tensor.shape)
    parts = tensor.pieces(source)
    assert [part.shape for part in parts] == tensor.piece_shapes()
    np.testing.assert_array_equal(tensor.assemble(parts), source)


def test_canonical_names():
    def rename(name):
        return None if name.startswith("junk") else name.removeprefix("old.")

    names = ["old.a", "b", "junk.1", "a"]
    assert canonical(names, rename) == {"a": ("a", "old.a"), "b": ("b",)}

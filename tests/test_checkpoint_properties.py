"""Checkpoints of any plain state: what is written comes back, and what was changed on the way does not."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transferkit.base.arrays import raw_bytes
from transferkit.errors import CheckpointError, CheckpointTypeError
from transferkit.saving import archive

PROFILE = settings(max_examples=25, deadline=None, derandomize=True, database=None)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@st.composite
def tensors(draw):
    """Small tensors of any type, shape and layout, with NaN and views that are conjugate or negative."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    numbers = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dtype = draw(st.sampled_from(DTYPES))
    tensor = numbers[..., 0].to(dtype)
    if dtype.is_floating_point and tensor.numel() and draw(st.booleans()):
        tensor.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -0.0]))
    if draw(st.booleans()):
        tensor = tensor.conj()  # a view, if it is complex
    if tensor.is_floating_point() and draw(st.booleans()):
        tensor = torch._neg_view(tensor)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


TEXT = st.text("a1/.'\"\\ \n\x00é猫😀")  # all of Unicode would take seconds to list
leaves = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | tensors()
states = st.dictionaries(
    TEXT.filter(lambda key: key not in ("format", "versions")),
    st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=12),
    max_size=4,
)


def same(left, right):
    """Whether two states are the same to the bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and raw_bytes(left) == raw_bytes(right)
    return repr(left) == repr(right)  # NaN is NaN, -0.0 is not 0.0


@PROFILE
@given(state=states)
def test_what_is_written_comes_back(state):
    """Any nested state of plain types and tensors comes back the same to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        archive.write_checkpoint(path, state)
        found = archive.read_checkpoint(path)
        assert [path.name for path in Path(folder).iterdir()] == ["state.pt"]

    assert set(found) == {"format", "versions", *state}
    assert same({name: found[name] for name in state}, state)


@PROFILE
@given(state=states, data=st.data())
def test_changed_bytes_never_give_another_state(state, data):
    """Bytes overwritten, cut out, doubled or appended give a CheckpointError or the same state: never another one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        archive.write_checkpoint(path, state)
        good, content = archive.read_checkpoint(path), path.read_bytes()
        start = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(0, 64))
        new = data.draw(st.binary(max_size=64) | st.just(content[start : start + 2 * length]))
        path.write_bytes(content[:start] + new + content[start + length :])
        try:
            found = archive.read_checkpoint(path)
        except CheckpointError:
            return
    assert same(found, good)


@PROFILE
@given(state=states, strange=st.sampled_from([b"x", 1j, {1}, object(), range(3), torch.float32, Path("x")]))
def test_anything_else_is_refused_before_a_byte(state, strange):
    """A state with something else anywhere in it is refused with its place, and no file appears."""
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(CheckpointTypeError, match=f"deep/0/here is a {type(strange).__name__}: "):
            archive.write_checkpoint(Path(folder) / "state.pt", {**state, "deep": [{"here": strange}]})
        assert list(Path(folder).iterdir()) == []


@PROFILE
@given(content=st.binary(max_size=400), zipped=st.booleans())
def test_bytes_of_any_kind_are_refused(content, zipped):
    """Random bytes, with or without the beginning of an archive, give a CheckpointError and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        path.write_bytes(b"PK\x03\x04" * zipped + content)
        with pytest.raises(CheckpointError, match=r"state\.pt"):
            archive.read_checkpoint(path)

"""Random numbers that depend on where they are used and on nothing that happened before."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transferkit.base.randomness import derive_seed, seeded, shuffled

TEXT = st.text("a1'\"\\ \n\x00é猫😀", max_size=5)  # all of Unicode would take seconds to list
PARTS = st.lists(st.one_of(st.integers(), TEXT), min_size=1, max_size=4)


def draw() -> tuple[float, float, float]:
    return float(torch.rand(1)), random.random(), float(np.random.rand())  # noqa: NPY002 - the generator that is global


def seed_all() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002


@settings(deadline=None, database=None, max_examples=50, derandomize=True)
@given(PARTS)
def test_derived_seed_fits_every_generator(parts):
    """A derived seed is from 0 to 2**63 - 1 and always the same."""
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert derive_seed(*parts) == seed


@settings(deadline=None, database=None, max_examples=50, derandomize=True)
@given(PARTS, PARTS)
def test_other_parts_derive_another_seed(first, second):
    """Other parts give another seed, "1" and 1 included."""
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second)


def test_derived_seed_is_the_same_in_every_process():
    """The seed depends on no hash that changes from one run of Python to the next."""
    assert derive_seed(0, "order", 1) == 2002067703672271585


@settings(deadline=None, database=None, max_examples=50, derandomize=True)
@given(st.integers(0, 200), st.integers(0, 2**63 - 1))
def test_shuffled_is_a_permutation(count, seed):
    """Every number comes exactly once, in the order of the seed."""
    order = shuffled(count, seed)
    assert order.sort().values.tolist() == list(range(count))
    assert torch.equal(shuffled(count, seed), order)


def test_shuffled_depends_on_the_seed():
    """Another seed gives another order."""
    assert not torch.equal(shuffled(50, 1), shuffled(50, 2))


def test_seeded_seeds_torch_numpy_and_python():
    """The same seed gives the same numbers of all three generators, another seed others."""
    drawn = []
    for seed in (7, 7, 8):
        with seeded(seed):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(one != other for one, other in zip(drawn[0], drawn[2], strict=True))


def test_seeded_puts_the_generators_back():
    """What comes after is drawn as if nothing had been drawn inside."""
    with seeded(3):
        seed_all()
        expected = draw()
    seed_all()
    with seeded(7):
        draw()
    assert draw() == expected


def fail_inside() -> None:
    with seeded(7):
        draw()
        raise RuntimeError("inside")


def test_seeded_puts_the_generators_back_after_an_error():
    """An error inside leaves the generators as they were."""
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_seeded_takes_every_derived_seed(seed):
    """The smallest and the largest seed serve, although numpy takes 32 bits only."""
    with seeded(seed):
        first = draw()
    with seeded(seed):
        assert draw() == first


@pytest.mark.gpu
def test_seeded_seeds_and_restores_the_gpu():
    """With a CUDA device its generator is seeded inside and put back after."""
    device = torch.device("cuda", torch.cuda.current_device())
    state = torch.cuda.get_rng_state(device)
    drawn = []
    for _ in range(2):
        with seeded(7, device):
            drawn.append(torch.rand(3, device=device))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.cuda.get_rng_state(device), state)

"""Random numbers that depend on where they are used and on nothing that happened before.

A run that is stopped and continued, or read by another number of workers, draws the same numbers.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a seed of 63 bits that depends on every part and on their order.

    Example:
        >>> derive_seed(0, "order", 1) == derive_seed(0, "order", 1)
        True
        >>> derive_seed(0, "order", 1) == derive_seed(0, "order", 2)
        False
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shuffled(count: int, seed: int) -> torch.Tensor:
    """Return the numbers 0 to `count - 1`, int64, in the order that `seed` stands for.

    Example:
        >>> sorted(shuffled(3, seed=0).tolist())
        [0, 1, 2]
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the generators of torch, numpy and Python inside, and put them back as they were after.

    Args:
        seed: 0 to 2**63 - 1.
        device: A CUDA device whose generator is seeded too.

    Example:
        >>> with seeded(1):
        ...     first = torch.rand(1)
        >>> with seeded(1):
        ...     assert torch.equal(torch.rand(1), first)
    """
    cuda = device if device is not None and device.type == "cuda" else None
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - a user's transform may use it
    cuda_state = torch.cuda.get_rng_state(cuda) if cuda else None
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        if cuda:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
        if cuda and cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, cuda)


def generator_states() -> tuple[bytes, ...]:
    """Return the states of the generators of torch, Python and numpy: equal as long as none of them was drawn from."""
    state: Any = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), state[1].tobytes(), repr((state[2:], random.getstate())).encode()

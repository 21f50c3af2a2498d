"""Random numbers that depend on where they are used alone, not on what was drawn before or by how many workers."""

import hashlib
import inspect
import os
import random
import threading
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import numpy as np
import torch

_LOCK = [threading.RLock()]  # the generators are one for each process

if hasattr(os, "register_at_fork"):  # in a forked process no thread is left that would release the lock
    os.register_at_fork(after_in_child=lambda: _LOCK.__setitem__(0, threading.RLock()))


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shuffled(count: int, seed: int) -> torch.Tensor:
    """Return a random permutation of 0 to `count - 1`, int64 `(count,)`, determined by `seed`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the generators of torch, numpy, Python and a CUDA `device` inside the block, and restore them afterwards."""
    cuda = device if device is not None and device.type == "cuda" else None
    with _LOCK[0]:  # a thread waits until no other one is inside, so that both draw their own numbers
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - users' transforms draw from it
        cuda_state = torch.cuda.get_rng_state(cuda) if cuda else None
        try:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too
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


def next_numbers() -> tuple[float, ...]:
    """Draw from each global generator: that tells in microseconds whether anything was drawn since `seeded`."""
    drawn = int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))
    return drawn, random.random(), np.random.random_sample()  # noqa: NPY002, S311


_GENERATORS = random.Random | np.random.Generator | np.random.RandomState | torch.Generator
_LEAVES = (str, bytes, int, float, type(None), torch.Tensor, np.ndarray, types.ModuleType, type)


def find_generators(root: object) -> list[Any]:
    """Return generators of random numbers that an object, or a function it holds, refers to, a few steps deep."""
    found: list[Any] = []
    seen: dict[int, object] = {}
    waiting: list[tuple[object, int]] = [(root, 0)]
    while waiting and len(seen) < 10_000:
        value, depth = waiting.pop()
        if id(value) in seen or isinstance(value, _LEAVES):
            continue
        seen[id(value)] = value
        if isinstance(value, _GENERATORS):
            found.append(value)
        elif depth < 6:
            waiting += [(part, depth + 1) for part in islice(_parts(value), 100)]
    return found


def _parts(value: Any) -> Iterable[object]:
    if isinstance(value, dict | list | tuple | set):
        return value.values() if isinstance(value, dict) else value
    if isinstance(value, types.FunctionType):
        with suppress(ValueError):  # a closure that is not filled yet
            used = inspect.getclosurevars(value)
            return *used.nonlocals.values(), *used.globals.values()
    methods = (getattr(type(value), name, None) for name in ("__getitem__", "__call__"))
    return *getattr(value, "__dict__", {}).values(), getattr(value, "__self__", None), *methods


def state_of(generator: Any) -> object:
    """Return something that differs once a generator was drawn from."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return repr(generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state())

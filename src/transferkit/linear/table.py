"""Rows of features, read in float32 blocks: cached features or one tensor, all of their columns or some."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from transferkit.compute.host_memory import host_bytes
from transferkit.features.chunks import CachedFeatures

BLOCK_BYTES = 64 * 2**20  # of a block of rows in float32: reading a table takes a few times this much memory
MEMORY_FRACTION = 0.25  # of the free memory that rows may take as float32; of a larger table some rows are kept
FEWEST_ROWS = 2000  # that are kept however little memory is free


@dataclass(frozen=True, eq=False)
class Table:
    """`N` rows of `D` features, somewhere, in some dtype.

    Example:
        >>> table = Table.of_tensor(torch.arange(6).reshape(2, 3), columns=[slice(2, 3), slice(0, 1)])
        >>> table.shape, list(table.blocks())
        ((2, 2), [tensor([[2., 0.],
                [5., 3.]])])
    """

    read: Callable[[int, int], Tensor]  # gives the rows from start to stop, floating point, (stop - start, all columns)
    count: int  # N
    width: int  # number of columns that `read` returns
    where: torch.device  # where the features are used
    columns: Sequence[slice] | None = None  # to use, ascending or not, one for each kind of features; None uses all

    @classmethod
    def of_tensor(cls, rows: Tensor, *, columns: Sequence[slice] | None = None) -> Self:
        """Return the table of a tensor `(N, ...)` of any number dtype, whose rows are flattened; nothing is copied."""
        flat = rows.flatten(1)
        count, width = flat.shape
        return cls(lambda start, stop: flat[start:stop], count, width, rows.device, columns)

    @classmethod
    def of_features(cls, features: CachedFeatures, *, columns: Sequence[slice] | None = None) -> Self:
        """Return the table of cached features, flattened as `nn.Flatten` does with `(N, C, h, w)`.

        All views lie end to end: row `v * N + i` is view `v` of image `i`. Files stay mapped.
        """
        rows, example = features.rows.flatten(), features.parts[0]

        def read(start: int, stop: int) -> Tensor:
            return features.gather(rows[start:stop].to(example.device)).permute(0, 3, 1, 2).flatten(1)

        return cls(read, len(rows), example[0].numel(), features.device.torch_device, columns)

    @property
    def device(self) -> torch.device:
        """Where the blocks go: not to Apple's MPS, which has no float64."""
        return torch.device("cpu") if self.where.type == "mps" else self.where

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, D)`."""
        return self.count, self.width if self.kinds is None else sum(self.kinds)

    @property
    def kinds(self) -> list[int] | None:
        """How many features of one kind lie side by side; None if that is not known."""
        if self.columns is None:
            return None
        return [len(range(*part.indices(self.width))) for part in self.columns]

    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows in order, float32 `(n, D)` on the device, in blocks of at most `BLOCK_BYTES`."""
        size = max(1, BLOCK_BYTES // (4 * max(1, self.width)))
        for start in range(0, self.count, size):
            block = self.read(start, min(start + size, self.count))
            if self.columns is not None:
                block = torch.cat([block[:, part] for part in self.columns], dim=1)
            yield block.to(self.device).float()

    def rows_in_memory(self) -> int:
        """Return how many of the rows the device has room for as float32."""
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        elif (memory := host_bytes()) is not None:
            free = memory["free"]
        else:
            return self.count  # the system does not say
        room = int(MEMORY_FRACTION * free) // (4 * max(1, self.shape[1]))
        return min(self.count, max(FEWEST_ROWS, room))

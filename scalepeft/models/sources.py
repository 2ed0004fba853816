"""A tensor of the base, wherever it comes from: read by rows, a rank its own."""

from collections.abc import Iterator

import torch
from torch import Tensor

from scalepeft.models.quant import Format

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Source:
    """A tensor of the base that is read by rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str  # it comes from, for messages
    by_rows: bool = True  # any rows can be read alone; else each call reads all of it
    unit: int = 1  # rows that are read together (those of an expert), from a multiple of it

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows ``first..last`` of dimension 0; a 0-d tensor is one row."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """Return all of it."""
        return self.rows(0, self.shape[0] if self.shape else 1)

    def pieces(self, step: int) -> Iterator[Tensor]:
        """Yield all rows, ``step`` at a time where they can be read alone."""
        length = self.shape[0] if self.shape else 1
        step = step if self.by_rows else max(1, length)
        for first in range(0, length, step):
            yield self.rows(first, min(first + step, length))

    def encoded(self, fmt: Format, first: int, last: int) -> tuple[Tensor, Tensor] | None:
        """Return rows as the files hold them in ``fmt`` (weight bytes, scale bytes), or None."""
        return None

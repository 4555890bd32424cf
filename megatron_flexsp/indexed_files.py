"""The header of a Megatron data set's index, for those who have Megatron's reader and for those who don't."""

import struct
from typing import NamedTuple

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = _HEADER.size
LENGTH_BYTES, POINTER_BYTES = 4, 8


class IndexHeader(NamedTuple):
    """What stands before an index's tables: each sequence's length and place, and each document's first sequence."""

    dtype_code: int
    sequences: int
    bounds: int
    """Documents and one."""

    @classmethod
    def of(cls, data: bytes) -> "IndexHeader":
        """From the first ``HEADER_BYTES`` of an index."""
        _, _, dtype_code, sequences, bounds = _HEADER.unpack(data)
        return cls(dtype_code, sequences, bounds)

    @property
    def index_bytes(self) -> int:
        """What the whole index takes."""
        return HEADER_BYTES + self.sequences * (LENGTH_BYTES + POINTER_BYTES) + self.bounds * POINTER_BYTES

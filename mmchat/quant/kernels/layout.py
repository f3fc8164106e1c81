"""Sizes of weights in blocks (blocks_reference.py says their order) and of keys and values, without
torch."""

from __future__ import annotations

ROWS, PART = 8, 64  # of a panel; columns that lie together
GROUPS = {4: 32, 6: 16, 8: 32}  # columns that share a scale, by bits
BLOCK6 = 256  # columns that share a d, with 6 bits
SCALE_BYTES = 4  # behind a key or value in int8


def row_bytes(bits: int, columns: int) -> int:
    """Bytes of a row of so many columns, a multiple of 64."""
    blocks = {4: 4, 6: -(-columns // BLOCK6) * 2, 8: 0}[bits]
    return columns * bits // 8 + columns // PART * 4 + blocks


def columns_of(bits: int, row: int) -> int:
    """Columns of rows of so many bytes. Raises ValueError where there are none."""
    rest = row % row_bytes(bits, BLOCK6) if bits == 6 else row
    columns = (row - rest) // row_bytes(bits, BLOCK6) * BLOCK6 + rest // (8 * bits + 4) * PART
    if row > 4 and row_bytes(bits, columns) == row:
        return columns
    raise ValueError(f"rows of {row} bytes are no weights in blocks of {bits} bits")

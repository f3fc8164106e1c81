"""Sizes of weights in blocks (blocks_reference.py says their order) and of keys and values, without
torch."""

from __future__ import annotations

ROWS, PART = 8, 64  # of a panel; columns that lie together
SCALE_BYTES = 4  # behind a key or value in int8
BITS = (4, 6, 8)  # of a level
TABLE = 5  # in place of bits: 4, which choose one of 16 whole numbers
GROUPS = {4: 32, TABLE: 64, 6: 16, 8: 32}  # columns that share a scale, by bits
LARGES = {4: 2, TABLE: 0, 6: 1, 8: 0}  # numbers of 16 bits that stand over them, for each block of
LARGE = 256  # columns


def part_bytes(bits: int) -> int:
    """Bytes of 64 columns of a row, but for what stands over blocks."""
    return PART * (4 if bits == TABLE else bits) // 8 + 4


def row_bytes(bits: int, columns: int) -> int:
    """Bytes of a row of so many columns, a multiple of 64."""
    return columns // PART * part_bytes(bits) + -(-columns // LARGE) * 2 * LARGES[bits]


def columns_of(bits: int, row: int) -> int:
    """Columns of rows of so many bytes. Raises ValueError where there are none."""
    blocks, rest = divmod(row, row_bytes(bits, LARGE))
    columns = blocks * LARGE + rest // part_bytes(bits) * PART
    if columns and row_bytes(bits, columns) == row:
        return columns
    raise ValueError(f"rows of {row} bytes are no weights in blocks of {bits} bits")

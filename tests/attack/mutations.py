"""Random changes of whole files: bits, numbers, lengths, pieces that repeat or go."""

from __future__ import annotations

import random
from collections.abc import Callable

Mutator = Callable[[random.Random, bytearray], None]


def change_bit(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def change_byte(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] = rng.choice(
        [0, 1, 0x22, 0x30, 0x39, 0x5B, 0x7B, 0x7F, 0x80, 255]
    )


def insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.randint(1, 9))


def delete(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randint(1, 20)]


def cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def repeat(rng: random.Random, data: bytearray) -> None:
    at, to = rng.randrange(len(data)), rng.randrange(len(data))
    data[to:to] = data[at : at + rng.randint(1, 60)]


def put_number(rng: random.Random, data: bytearray) -> None:
    size = rng.choice([2, 4, 8])
    at = rng.randrange(len(data))
    value = rng.choice([0, 1, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
    data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


MUTATORS: list[Mutator] = [change_bit, change_byte, insert, delete, cut, repeat, put_number]


def mutated(rng: random.Random, whole: bytes, before: int | None = None) -> bytes:
    """`whole` with one to three changes, all of them in its first `before` bytes."""
    data = bytearray(whole[:before])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if data:
            rng.choice(MUTATORS)(rng, data)
    return bytes(data) + (whole[before:] if before else b"")

import pytest
import torch

from mmchat.errors import MemoryError_
from mmchat.hardware import bandwidth
from mmchat.hardware.bandwidth import measure_bandwidth
from mmchat.limits import MIB

CPU = torch.device("cpu")


def test_the_figure_is_that_of_the_quickest_slice(monkeypatch):
    slowest_first = iter([0.5] * 9 + [0.125] + [0.25] * 22)
    monkeypatch.setattr(bandwidth, "_seconds", lambda read, device, clock: next(slowest_first))
    measured = measure_bandwidth(CPU, rounds=2, buffer_bytes=8 * MIB)
    assert measured.buffer_bytes == 8 * MIB
    assert measured.bytes_per_second == pytest.approx(MIB / 0.125)
    assert measured.threads == torch.get_num_threads()


def test_every_round_reads_the_whole_buffer_as_a_sum_and_in_a_product(monkeypatch):
    totals = []
    monkeypatch.setattr(
        bandwidth, "_seconds", lambda read, device, clock: (totals.append(read().sum()), 1.0)[1]
    )
    measure_bandwidth(CPU, rounds=1, buffer_bytes=MIB)
    in_pairs, product = totals[:8], totals[8:]
    # float64 made of two ones of float32 is 0.0078…; its sum counts the pairs.
    one = torch.ones(2).view(torch.float64).item()
    assert sum(in_pairs).item() / one == MIB / 8
    assert sum(product).item() == MIB / 4


@pytest.mark.parametrize(("cache", "expected"), [(32, 256), (300, 600), (4096, 1024)])
def test_the_buffer_is_larger_than_the_last_level_cache(monkeypatch, cache, expected):
    cpu = bandwidth.describe_cpu().__class__("x", (), cache * MIB)
    monkeypatch.setattr(bandwidth, "describe_cpu", lambda: cpu)
    monkeypatch.setattr(bandwidth, "available_memory", lambda device: 10**12)
    assert bandwidth.buffer_size(CPU) == expected * MIB


def test_the_buffer_leaves_most_of_a_small_memory_free(monkeypatch):
    monkeypatch.setattr(bandwidth, "available_memory", lambda device: 400 * MIB)
    assert bandwidth.buffer_size(CPU) == 100 * MIB


def test_a_buffer_that_cannot_be_had_is_a_memory_error():
    with pytest.raises(MemoryError_, match="MiB free to measure"):
        measure_bandwidth(CPU, buffer_bytes=2**60)


def test_the_clock_that_is_given_is_read():
    ticks = iter(range(10_000))
    measured = measure_bandwidth(CPU, rounds=1, buffer_bytes=8 * MIB, clock=lambda: next(ticks))
    assert measured.bytes_per_second == MIB  # a slice in one tick

import itertools

import pytest
import torch

from mmchat.estimate import speed
from mmchat.quant.schemes import INT8

CPU = torch.device("cpu")


def measured(monkeypatch, alone: float, walls: list[float]) -> float:
    """Bytes a second of an int8 layer, where one thread takes `alone` seconds of its own time."""
    clock, seconds = itertools.count(0, 0.5), itertools.cycle(walls)

    def timed(layers, x, clock=None):
        return alone if clock else next(seconds)

    monkeypatch.setattr(speed, "_seconds", timed)
    monkeypatch.setattr(speed, "buffer_size", lambda device: 1)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    return speed._linear_speed(INT8, CPU, torch.float32) / INT8.nbytes(4096, 4096, 4)


def test_a_steady_speed_is_a_figure(monkeypatch):
    assert measured(monkeypatch, 2.0, [1.1, 1.0, 1.2, 50.0]) == 1.0


def test_threads_that_are_slower_than_one_alone_were_kept_waiting(monkeypatch):
    with pytest.raises(speed.BusyError):
        measured(monkeypatch, 0.9, [1.0])


def test_one_lucky_moment_is_no_figure(monkeypatch):
    with pytest.raises(speed.BusyError):
        measured(monkeypatch, 20.0, [1.0, *[9.0] * 50])

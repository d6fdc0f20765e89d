"""Micro-batches on the device, one ahead: while one computes, the next is on its way, and no
third is there.

A copy runs on a side stream from pinned memory, so neither the host nor the computation waits for
it. Before a copy starts, the side stream waits for the computation that the host has queued so far,
which is that of the micro-batch before the one that computes meanwhile. So memory that the host let
go of by then can be used again at once, in the order of the side stream, and the device holds two
micro-batches' inputs at most, besides what kept graphs hold. On the CPU and on a stand-in device
streams do nothing, and the same calls are made.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch

from sailplan.data.record import EncoderInputs


@functools.cache
def _side_stream(device: torch.device) -> torch.Stream:
    """One for all uploads to a device: memory that was allocated on a stream is used again on
    that stream alone.
    """
    return torch.get_device_module(device).Stream()


class Uploads(Iterator[EncoderInputs]):
    """Iterates over micro-batches on the device.

    The caller lets go of a micro-batch before it asks for the next: `encode(next(uploads))` without
    a name does.
    """

    def __init__(self, inputs: Iterable[EncoderInputs], device: torch.device) -> None:
        self.device = device
        self._streams = torch.get_device_module(device)
        self._side = _side_stream(device)
        self._inputs = iter(inputs)
        self._ahead = self._start()

    def __next__(self) -> EncoderInputs:
        if self._ahead is None:
            raise StopIteration
        self._streams.current_stream().wait_stream(
            self._side
        )  # its latest copy is that of the one ahead
        ready, self._ahead = self._ahead, None
        self._ahead = self._start()
        return ready

    def _start(self) -> EncoderInputs | None:
        following = next(self._inputs, None)
        if following is None:
            return None
        self._side.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._side):
            return following.to(self.device)

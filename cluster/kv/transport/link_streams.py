"""The device's streams on which links copy and transfer."""

from __future__ import annotations

from typing import Any

import torch


class Streams:
    """Streams of links, used again: torch has 32 of a priority and deals them out in turn. The
    engine's are of another priority, so a link never waits in one of those."""

    def __init__(self) -> None:
        self._free: list[Any] = []

    def take(self, device: torch.device) -> Any:
        for stream in self._free:
            if stream.device == device:
                self._free.remove(stream)
                return stream
        return torch.cuda.Stream(device, priority=-1)

    def give_back(self, *streams: Any) -> None:
        self._free.extend(streams)


STREAMS = Streams()

"""Streams of a scheduler for tests that have no device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


class Streams:
    """A scheduler's streams, which write down what happens to them."""

    def __init__(self, enable_overlap: bool) -> None:
        self.enable_overlap = enable_overlap
        self.events: list[str] = []
        self.schedule_stream, self.forward_stream = self._stream("schedule"), self._stream("forward")

    def _stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name, wait_stream=lambda other: self.events.append(f"{name} waits for {other.name}")
        )

    @property
    @contextmanager
    def forward_stream_ctx(self) -> Iterator[None]:
        self.events.append("on forward")
        yield
        self.events.append("off forward")

"""The order of work on the device: with the overlap schedule, forward passes run on a stream of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class ForwardStream:
    """Where the policy model's forward passes run. What is queued there comes after one pass and before the next.

    Beside them, on the scheduler's own stream, a second model would use the same workspace of the all-reduce at the same
    time, and a buffer could change while a pass reads it. Without the overlap schedule there is one stream anyhow.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    @property
    def _is_apart(self) -> bool:
        """False as long as the scheduler starts, too: then it has no streams yet."""
        return self._scheduler.enable_overlap and hasattr(self._scheduler, "forward_stream")

    @contextmanager
    def queued(self) -> Iterator[None]:
        """What the block launches runs after all that was launched so far."""
        scheduler = self._scheduler
        if not self._is_apart:
            yield
            return
        with scheduler.forward_stream_ctx:
            scheduler.forward_stream.wait_stream(scheduler.schedule_stream)
            yield

    @contextmanager
    def joined(self) -> Iterator[None]:
        """As `queued`; and what the scheduler launches later on its own stream runs after it."""
        try:
            with self.queued():
                yield
        finally:
            if self._is_apart:
                self._scheduler.schedule_stream.wait_stream(self._scheduler.forward_stream)

"""A block of the emulator: what its partitions, a thread each, share."""

from __future__ import annotations

import random
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .shared import Barrier

local = threading.local()


class Block:
    """Its barriers, its failure, and the engine that moves boxes some time after it was told to."""

    TIMEOUT = 60.0      # seconds, of any wait

    def __init__(self, seed: int, cluster: Any = None, rank: int = 0) -> None:
        self.failed: BaseException | None = None
        self.cluster, self.rank, self.memory = cluster, rank, None
        self.by_address: dict[int, Barrier] = {}
        self.barriers: list[Barrier] = []
        self.random = random.Random(seed)
        self.queue: deque[Any] = deque()
        self.copies: list[Any] = []         # cp.async: there once they are waited for
        self.wake = threading.Condition()
        self.stop = False
        self.engine = threading.Thread(target=self._move, daemon=True)
        self.engine.start()

    def submit(self, job: Any) -> None:
        with self.wake:
            self.queue.append(job)
            self.wake.notify()

    def _move(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.queue or self.stop)
                if not self.queue:
                    return
                # loads and stores overtake each other
                i = self.random.randrange(min(len(self.queue), 4))
                job = self.queue[i]
                del self.queue[i]
            job()

    def end(self) -> None:
        with self.wake:
            self.stop = True
            self.wake.notify_all()
        self.engine.join(self.TIMEOUT)

    def fail(self, e: BaseException) -> None:
        self.failed = self.failed or e
        if self.cluster is not None:
            self.cluster.all.abort()
        for b in self.barriers:
            with b.changed:
                b.changed.notify_all()


def current() -> Block:
    """The block that this thread is a partition of."""
    return local.block


def start(block: Block, program: tuple[int, int]) -> None:
    """This thread is a partition of `block`; `program`: its number, and how many there are."""
    local.block, local.program, local.flight, local.stores = block, program, deque(), deque()

"""Ranks as threads of one process, of which only one runs at a time."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Aborted(BaseException):
    """Ends the threads of ranks that wait for a failed one."""


class RankThreads(ABC):
    """Runs a function for each rank; a subclass chooses the rank that runs next.

    Args:
        size: the number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._turn = [threading.Lock() for _ in range(size)]  # held until it is the rank's turn
        self._finished = [False] * size
        self._failure: BaseException | None = None

    def run_ranks(self, body: Callable[[int], T]) -> list[T]:
        """Run `body(rank)` once for each rank and return the results in rank order.

        Raises:
            Exception: the exception of the first rank that failed.
        """
        results: dict[int, T] = {}

        def main(rank: int) -> None:
            self._turn[rank].acquire()
            try:
                if self._failure is None:
                    results[rank] = body(rank)
            except Aborted:
                pass
            except BaseException as error:
                self._failure = self._failure or error
            self._finished[rank] = True
            self._run_next()

        for turn in self._turn:
            turn.acquire()
        threads = [threading.Thread(target=main, args=(r,), daemon=True) for r in range(self.size)]
        for thread in threads:
            thread.start()
        self._run_next()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return [results[rank] for rank in range(self.size)]

    def yield_turn(self, rank: int) -> None:
        """Let another rank run; return when this rank is chosen again."""
        self._run_next()
        self._turn[rank].acquire()
        if self._failure is not None:
            raise Aborted

    def _give_turn(self, rank: int) -> None:
        self._turn[rank].release()

    def _any_unfinished(self) -> int | None:
        return next((r for r in range(self.size) if not self._finished[r]), None)

    @abstractmethod
    def _run_next(self) -> None:
        """Choose the next rank that can run, and run it by `_give_turn`."""

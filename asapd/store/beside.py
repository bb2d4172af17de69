"""One thing at a time done beside the caller, in a thread that is kept for the next one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

IDLE_S = 1.0
"""A thread that had nothing to do for so long ends: the next one takes a millisecond to start on a busy machine."""


class Beside:
    """Begins work, which the caller waits for before the next."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Future[None], Callable[[], None]]] = queue.SimpleQueue()
        self._changing = threading.Lock()
        self._has_thread = False

    def begin(self, work: Callable[[], None]) -> Future[None]:
        """Have something done, and go on. It returns nothing, for the thread to hold while the caller works on.

        Raises:
            RuntimeError: no thread is to be had, and nothing will be done.
        """
        done: Future[None] = Future()
        with self._changing:
            if not self._has_thread:
                threading.Thread(target=self._run, daemon=True).start()
                self._has_thread = True
            self._waiting.put((done, work))
        return done

    def _run(self) -> None:
        while True:
            try:
                done, work = self._waiting.get(timeout=IDLE_S)
            except queue.Empty:
                with self._changing:
                    if self._waiting.empty():
                        self._has_thread = False
                        return
                continue
            try:
                work()
            except BaseException as error:  # noqa: ASYNC103, BLE001 -- the caller waits for the outcome
                done.set_exception(error)
            else:
                done.set_result(None)
            del done, work

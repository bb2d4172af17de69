"""Ctrl-C at one place after the other: wherever CPython looks at signals."""

from __future__ import annotations

import dis
import itertools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, ModuleType
from typing import Any

# After these it looks at them: a call of what is written in C, the beginning of a function, the next turn of a loop.
_LOOKS = frozenset({"CALL", "CALL_FUNCTION_EX", "CALL_KW", "RESUME", "JUMP_BACKWARD"})


class Interrupt:
    """Have a call interrupted once, at the place with a number; `came` says whether there is such a place."""

    def __init__(self, place: int, modules: tuple[ModuleType, ...]) -> None:
        self._left = place
        self._files = {module.__file__ for module in modules}
        self._before: dict[FrameType, str | None] = {}
        self.came = False

    def __call__(self, work: Callable[[], object]) -> None:
        """Do it; the interrupt ends here."""
        former = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # 3.12 looks for it only when the tracing begins
        sys.settrace(self._trace)
        try:
            work()
        except KeyboardInterrupt:
            assert self.came
        finally:
            sys.settrace(former)
            self._before.clear()

    def _trace(self, frame: FrameType, kind: str, _: Any) -> Any:
        if kind == "call" and frame.f_back is not None:
            self._before.pop(frame.f_back, None)  # after a call of what is written in Python it does not look
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = True
        if kind == "opcode":
            before, self._before[frame] = self._before.get(frame), _operation(frame.f_code, frame.f_lasti)
            if before in _LOOKS and not self.came:
                self._left -= 1
                if self._left < 0:
                    self.came = True
                    raise KeyboardInterrupt
        return self._trace


def everywhere(*modules: ModuleType) -> Iterator[Interrupt]:
    """An interrupt for each place in these modules that the call comes by; the last one does not come."""
    for place in itertools.count():
        interrupt = Interrupt(place, modules)
        yield interrupt
        if not interrupt.came:
            assert place > 0
            return


_operations: dict[CodeType, dict[int, str]] = {}


def _operation(code: CodeType, place: int) -> str | None:
    known = _operations.get(code)
    if known is None:
        known = _operations[code] = {one.offset: one.opname for one in dis.get_instructions(code)}
    return known.get(place)

"""What another thread may do between two instructions, tried out between any two of them."""

from __future__ import annotations

import sys
from itertools import count


class _Call:
    """Calls a function, with another in its midst."""

    def __init__(self, turn, files):
        self._turn = turn
        self._files = files
        self.has_happened = False

    def __call__(self, function, other):
        instructions = count()

        def trace(frame, event, _):
            if frame.f_code.co_filename not in self._files:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            if event == "opcode" and next(instructions) == self._turn:
                self.has_happened = True
                # Nothing is traced while this runs.
                other()
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return function()
        finally:
            sys.settrace(before)


def each_interleaving(*modules, step=1):
    """Yield what calls one function with another in its midst, once for each place there is.

    The first calls the other before the first instruction in one of the modules, the next before
    the second, and so on, until there was none left.
    """
    files = {module.__file__ for module in modules}
    for turn in count(0, step):
        call = _Call(turn, files)
        yield call
        if not call.has_happened:
            return

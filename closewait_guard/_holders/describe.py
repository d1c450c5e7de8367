"""Find out who holds objects; each path of references becomes a sentence that reads as code."""

from __future__ import annotations

import functools
import gc
import io
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import (
    AsyncGeneratorType,
    CellType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    MethodType,
    TracebackType,
)
from typing import Any, NamedTuple

from closewait_guard._format import pluralize
from closewait_guard._holders.references import (
    HolderPath,
    code_of_call,
    find_paths,
    find_paths_forward,
)
from closewait_guard._holders.roots import FALLBACK, FOREIGN, OWN, Roots, suspended_calls
from closewait_guard._holders.threads import (
    current_calls,
    describe_call,
    describe_calls,
    make_call,
    thread_name,
)
from closewait_guard._inspect import kind_of
from closewait_guard._libraries import LIBRARIES, RUNNING_CALL
from closewait_guard._live import (
    MAX_ITEMS,
    attribute_dict,
    attributes_of,
    class_value,
    elements_of,
    is_a,
    is_any_of,
    is_exactly,
    items_of,
    locals_of,
    module_dict,
    native_field,
    suspension_of,
    text_of,
    type_name,
    type_qualname,
)
from closewait_guard.model import FrameKind

__all__ = [
    "Holders",
    "find_holders",
    "find_holders_forward",
    "sentence_of",
]


class Holders(NamedTuple):
    """Who holds one object. Plain text: it keeps nothing alive.

    Attributes:
        sentences: Each says who holds it, and how.
        owners: The names of the types on the paths, the outermost holder's first.
        has_failed: The search or the description raised an exception.
    """

    sentences: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    has_failed: bool = False


def find_holders(
    targets: list[object], deadline: float, roots: Roots | None = None
) -> list[Holders]:
    """Find out who holds each of some objects, all at once.

    Args:
        targets: The objects. The caller must have no other reference to them; the list is emptied.
        deadline: The monotonic time after which the search goes no further.
        roots: Where a path may end. Make it before the targets are taken out of weak references: a
            garbage collection meanwhile would break up the cycle that a target is in.
    """
    found = [Holders()] * len(targets)

    def store(place: int, paths: list[HolderPath]) -> None:
        found[place] = _describe_or_fail(paths)

    find_paths(targets, Roots() if roots is None else roots, deadline, store)
    return found


def find_holders_forward(
    targets: list[object], roots: Roots, is_over: Callable[[], bool]
) -> list[Holders | None]:
    """Do the same by a forward search, without asking the whole heap; None for those not reached.

    Args:
        targets: As above.
        roots: Where a path may end, made with the values to start from.
        is_over: Whether to stop.
    """
    found: list[Holders | None] = [None] * len(targets)

    def store(place: int, paths: list[HolderPath]) -> None:
        found[place] = _describe_or_fail(paths)

    find_paths_forward(targets, roots, is_over, store)
    return found


def _describe_or_fail(paths: list[HolderPath]) -> Holders:
    try:
        return _describe(paths)
    except Exception:
        # An object has changed while it was described. The others are described all the same.
        return Holders(has_failed=True)


def _describe(paths: list[HolderPath]) -> Holders:
    # An event loop is an end of paths, and may be what is asked for.
    paths = [path for path in paths if path.rank != FALLBACK or len(path.things) > 1]
    best = [path for path in paths if path.rank == paths[0].rank]
    sentences = dict.fromkeys([*map(sentence_of, best), *threads_using(paths)])
    owners = dict.fromkeys(owner for path in paths for owner in owners_of(path))
    running = (RUNNING_CALL,) if is_held_by_running_call(best) else ()
    return Holders(tuple(sentences), (*running, *owners))


_MAX_STEPS = 12
_MAX_CALLS = 8
# The length of a path from a variable to a socket inside a connection or file, and one wrapper.
_MAX_NEAR = 3
_GENERATORS = (GeneratorType, AsyncGeneratorType)
_BY_TRACEBACK = ", kept by an exception's traceback"


def sentence_of(path: HolderPath) -> str:
    """The sentence that says who holds the last object of a path, and how."""
    if path.rank == FOREIGN and (sentence := _from_own_call(path.things)):
        return sentence
    text = PathText(path)
    text.follow(path.things)
    parts = text.parts()
    if path.root is not None:
        template = path.root.template
        if not parts:
            return template.removesuffix(": {}").replace("{}", "")
        return ": ".join((template.replace("{}", parts[0], 1), *parts[1:]))
    body = ": ".join(parts) or text.expression
    if path.is_cycle:
        through = _describe_cycle(path.things)
        body = body.replace(_BY_TRACEBACK, "")
        return f"reference cycle {through}: {body}; nothing else holds it"
    if path.is_held_by_unseen:
        frozen = "what gc.freeze() hides, " if gc.get_freeze_count() else ""
        return f"{frozen}native code, or a call under way that has no name for it: {body}"
    return f"{body} (what holds that was not found in time)"


def _from_own_call(things: tuple[object, ...]) -> str:
    """Start at the program's own suspended generator: how a library keeps it does not matter."""
    for number, thing in enumerate(things):
        code = code_of_call(thing) if is_exactly(thing, _GENERATORS) else None
        if code is not None and kind_of(text_of(code.co_filename) or "") is FrameKind.USER:
            text = PathText(HolderPath(None, things[number:]))
            text.follow(things[number:])
            return ": ".join(text.parts())
    return ""


def threads_using(paths: list[HolderPath]) -> list[str]:
    """The calls of other threads that have the object in a local variable, or close to one."""
    near = [path for path in paths if len(path.things) <= _MAX_NEAR]
    threads = [path.root.thread for path in near if path.root is not None]
    others = {thread for thread in threads if thread not in (None, threading.get_ident())}
    return [
        sentence
        for thread in others
        if thread is not None and (sentence := _describe_thread(thread))
    ]


def _describe_thread(thread: int) -> str | None:
    calls = current_calls(thread)
    # What libraries do inside the program's innermost call is named with the variable.
    calls = [call for call in calls if call.is_user] or calls
    if len(calls) < 2:
        return None
    sentence = ", ".join(describe_call(call) for call in calls[:_MAX_CALLS])
    more = len(calls) - _MAX_CALLS
    rest = f" and {pluralize(more, 'more call')}" if more > 0 else ""
    return f"thread {thread_name(thread)}, whose calls now are {sentence}{rest}"


def is_held_by_running_call(paths: list[HolderPath]) -> bool:
    """Whether only variables of the program, in calls of other threads, have the object itself."""
    return all(
        path.root is not None
        and len(path.things) == 1
        and path.root.rank == OWN
        and path.root.thread not in (None, threading.get_ident())
        for path in paths
    )


def owners_of(path: HolderPath) -> tuple[str, ...]:
    """The types of the objects on a path, the outermost first."""
    return tuple(dict.fromkeys(type_name(thing) for thing in path.things))


@functools.cache
def _clients() -> tuple[str, ...]:
    """The classes that libraries' hints name, in the order of the hints."""
    holders = (hint.holder for library in LIBRARIES for hint in library.hints)
    return tuple(name for name in holders if name.rpartition(".")[2][:1].isupper())


def _place_of_client(things: tuple[object, ...]) -> int | None:
    """Which object of a path the hint is about: what lies beyond is not its user's to close."""
    names = [type_name(thing) for thing in things]
    return next((names.index(client) for client in _clients() if client in names), None)


def _public_name(thing: object) -> str:
    """The class as its users import it: `requests.Session`, where that is the same."""
    name = type_name(thing)
    package = name.partition(".")[0]
    short = type_qualname(type(thing))
    variables = module_dict(sys.modules.get(package)) or {}
    return f"{package}.{short}" if variables.get(short) is type(thing) else name


def _describe_cycle(things: tuple[object, ...]) -> str:
    if any(is_any_of(thing, (TracebackType, FrameType, BaseException)) for thing in things):
        return "through an exception's traceback"
    plain = (dict, list, tuple, CellType)
    names = dict.fromkeys(_short_name(thing) for thing in things if not is_exactly(thing, plain))
    return "of " + ", ".join(names)


def _short_name(thing: object) -> str:
    return type_qualname(type(thing))


class PathText:
    """The expressions for a path; a local variable on the path starts a new one."""

    def __init__(self, path: HolderPath) -> None:
        outermost = path.things[0]
        self.expression = path.root.expression if path.root else _short_name(outermost)
        self._is_rooted = path.root is not None
        self._steps: list[str] = []
        self._parts: list[str] = []
        # The client or response that the path ends at, by the name that its users know.
        self._client = ""
        # The dict of the attributes of the object before, or of a module's globals.
        self._attributes = outermost if path.root and path.root.is_namespace else None

    def parts(self) -> list[str]:
        """The expressions and calls, outermost first, and the client that they lead to."""
        own = [*self._parts, *([self._finish_expression()] if self._steps else [])]
        return [*own, *([self._client] if self._client else [])]

    def _finish_expression(self) -> str:
        steps = self._steps
        if len(steps) > _MAX_STEPS:
            half = _MAX_STEPS // 2
            steps = [*steps[:half], "...", *steps[-half:]]
        return (self.expression + "".join(steps)).lstrip(".")

    def follow(self, things: tuple[object, ...]) -> None:
        """Add all steps of a path, down to the client or response that its user has to close."""
        if (end := _place_of_client(things)) is not None:
            self._client = _public_name(things[end])
            things = things[: end + 1]
        for number in range(len(things) - 1):
            parent, child = things[number], things[number + 1]
            describe = next(
                (describe for kind, describe in _VARIABLES if type(parent) is kind), None
            )
            if describe is not None:
                self._enter(*describe(parent, things[number + 1 :]))
            elif not _is_transparent(parent, child):
                self._step(parent, child)

    def _enter(self, name: str, call: str) -> None:
        """Start a new expression with a variable of a call."""
        if name:
            # If the holder of the call is unknown, the path to the call does not matter.
            self._parts += [self._finish_expression()] if self._steps and self._is_rooted else []
            self._parts.append(call)
            self.expression, self._steps = name, []

    def _step(self, parent: object, child: object) -> None:
        if parent is self._attributes:
            self._steps.append("." + (item_of(parent, child) or "?")[1:-1].strip("'"))
            return
        if is_a(parent, type) or attribute_dict(parent) is child:
            self._attributes = child
            return
        name = attribute_of(parent, child)
        step = f".{name}" if name is not None else item_of(parent, child)
        self._steps.append(step or f".<{_short_name(child)}>")


# Objects between two others that the reader does not see in the code.
_TRANSPARENT = (CellType, MethodType, TracebackType)
_CONTAINERS = (dict, list, tuple, set, deque)
_VariableAndCall = tuple[str, str]


def _is_transparent(parent: object, child: object) -> bool:
    is_closure = type(parent) is tuple and type(child) is CellType
    is_awaited = type(child) is CoroutineType and not is_exactly(parent, _CONTAINERS)
    return is_exactly(parent, _TRANSPARENT) or is_closure or is_awaited


def _name_of_variable(frame: FrameType | None, things: tuple[object, ...]) -> str:
    """The frame's variable for the first of some objects, or for the content of a cell."""
    wanted = things[1] if type(things[0]) is CellType and len(things) > 1 else things[0]
    names = locals_of(frame) if frame is not None else {}
    return next((name for name, value in names.items() if value is wanted), "")


def _local_of_frame(frame: Any, things: tuple[object, ...]) -> _VariableAndCall:
    name = _name_of_variable(frame, things)
    call = make_call(frame.f_code, frame.f_lineno)
    return name, f"local {name!r} of {describe_call(call)}{_BY_TRACEBACK}"


def _local_of_suspended(waiting: Any, things: tuple[object, ...]) -> _VariableAndCall:
    frame, _ = suspension_of(waiting)
    name = _name_of_variable(frame, things)
    call = f"{text_of(waiting.__qualname__)}()".replace(">()", ">")
    if type(waiting) is CoroutineType:
        return name, f"local {name!r} of {call}"
    return (
        name,
        f"local {name!r} of {call}, suspended at {describe_calls(suspended_calls(waiting))}",
    )


def _variable_of_closure(function: Any, things: tuple[object, ...]) -> _VariableAndCall:
    closure = function.__closure__ or ()
    cell = next((thing for thing in things if type(thing) is CellType), None)
    names = zip(function.__code__.co_freevars, closure, strict=True)
    name = next((name for name, each in names if each is cell), "")
    return name, f"variable {name!r} in the closure of {text_of(function.__qualname__)}()"


_VARIABLES: tuple[tuple[type, Callable[[Any, tuple[object, ...]], _VariableAndCall]], ...] = (
    (FrameType, _local_of_frame),
    (CoroutineType, _local_of_suspended),
    (GeneratorType, _local_of_suspended),
    (AsyncGeneratorType, _local_of_suspended),
    (FunctionType, _variable_of_closure),
)


# How one object refers to another, as code: the attribute, index or key.
_MAX_KEY_LENGTH = 40
_MAX_BITS = 128
_MAX_DECIMAL = 1 << _MAX_BITS

# The fields of C types, which have no dict.
_C_FIELDS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (io.BufferedReader, ("raw",)),
    (io.BufferedWriter, ("raw",)),
    (io.TextIOWrapper, ("buffer",)),
    (MethodType, ("__self__", "__func__")),
    (functools.partial, ("func", "args", "keywords")),
    (BaseException, ("__traceback__", "__context__", "__cause__", "args")),
    (TracebackType, ("tb_frame", "tb_next")),
    (CellType, ("cell_contents",)),
    (FunctionType, ("__closure__", "__defaults__", "__kwdefaults__", "__dict__")),
)


def attribute_of(parent: object, child: object) -> str | None:
    """The name of the attribute of the parent that is `child`, if there is one."""
    for name, value in attributes_of(parent):
        if value is child:
            return name
    for cls, names in _C_FIELDS:
        if is_a(parent, cls):
            for name in names:
                if native_field(parent, cls, name) is child:
                    return name
    return None


def item_of(parent: object, child: object) -> str | None:
    """The place of the child in a container, as `[3]` or `['EUR']`; None if it is no container."""
    if is_a(parent, dict):
        items = items_of(parent)
        if found := [key for key, value in items if value is child]:
            # IPython has `_` for its last value, which soon is another: `_3` stays.
            lasting = next(
                (key for key in found if type(key) is not str or key.strip("_")), found[0]
            )
            return f"[{_format_key(lasting)}]"
        return ".keys()" if len(items) < MAX_ITEMS else "[...]"
    if is_any_of(parent, (list, tuple, deque)):
        elements = elements_of(parent)
        for number, value in enumerate(elements):
            if value is child:
                return _field_name(parent, number) or f"[{number}]"
        return None if len(elements) < MAX_ITEMS else "[...]"
    return "{...}" if is_any_of(parent, (set, frozenset)) else None


def _field_name(parent: object, number: int) -> str | None:
    """The name that a named tuple has for one of its items."""
    fields = class_value(type(parent), "_fields")
    if type(fields) is tuple and number < len(fields) and type(fields[number]) is str:
        return f".{fields[number]}"
    return None


def _format_key(key: object) -> str:
    """A plain key as text, shortened; for others the type, because repr would run their code."""
    if type(key) is tuple and len(key) <= 4:
        return ", ".join(_format_key(part) for part in key)
    if type(key) is str:
        return repr(key if len(key) <= _MAX_KEY_LENGTH else key[: _MAX_KEY_LENGTH - 3] + "...")
    if type(key) is int and not -_MAX_DECIMAL < key < _MAX_DECIMAL:
        # It may have more decimal digits than the interpreter converts.
        return hex(key >> max(0, key.bit_length() - _MAX_BITS)) + "..."
    if type(key) is int or type(key) is float or type(key) is bool or key is None:
        return repr(key)
    return f"<{type_qualname(type(key))}>"

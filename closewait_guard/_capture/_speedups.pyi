import socket
from collections.abc import Callable
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any, final

from closewait_guard._capture.creation import CreationTuple
from closewait_guard._capture.stack import CapturedStack
from closewait_guard._enums import Origin, Scalar

@final
class Recorder:
    pid: int
    def __new__(
        cls,
        fields: tuple[str, ...],
        depth: int,
        pid: int,
        intern_after: int,
        creations: dict[int, CreationTuple],
        detached: dict[int, tuple[CreationTuple, int]],
        listeners: dict[int, socket.socket],
        threads: dict[int, Any],
        modules: dict[str, Any],
        ends: tuple[CodeType, ...],
        fileno: Callable[[socket.socket], int],
        reference_callback: Callable[[Any], object] | None,
        labels: ContextVar[tuple[object, ...]],
        provider: Callable[[], dict[str, Scalar] | None] | None,
        fallback_provider: Callable[[], dict[str, Scalar]],
        no_context: dict[str, Scalar],
        created: Origin,
        accepted: Origin,
        accept_code: CodeType | None,
        as_parent: Callable[[CreationTuple], CreationTuple],
        origin_of: Callable[..., tuple[Origin, CreationTuple | None]],
        note_task: Callable[[CapturedStack, FrameType], str | None],
        exact_text: Callable[[object], str],
        intern_stacks: Callable[[dict[int, CreationTuple]], None],
    ) -> Recorder: ...
    @property
    def last_serial(self) -> int: ...
    def on_create(self, sock: socket.socket, descriptor: object, /) -> None: ...
    def count(self) -> int: ...

@final
class Finalizer:
    def __new__(
        cls,
        fileno: Callable[[socket.socket], int],
        notify: Callable[[socket.socket], None],
        original: Callable[[Any], Any],
        is_for_open_only: bool,
    ) -> Finalizer: ...
    @property
    def __wrapped__(self) -> Callable[[Any], Any]: ...
    def __call__(self, sock: socket.socket, /) -> object: ...

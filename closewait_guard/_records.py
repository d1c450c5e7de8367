"""From the story of a birth to the public record of it."""

from __future__ import annotations

from dataclasses import replace

from closewait_guard._birth import Birth
from closewait_guard._frames import resolve
from closewait_guard._origin import Origin
from closewait_guard._socket_values import SocketRecord
from closewait_guard._story import Story

__all__ = ["record_of"]


def record_of(story: Story, pid: int) -> SocketRecord:
    """The public record, with its stack resolved. Those of another process are inherited ones."""
    fields = Birth._make(story)._asdict()
    del fields["sock"], fields["key"]
    fields["stack"] = resolve(fields["stack"])
    if fields["parent"] is not None:
        fields["parent"] = record_of(fields["parent"], pid)
    record = SocketRecord(**fields)
    if record.pid == pid:
        return record
    return replace(record, pid=pid, origin=Origin.INHERITED, parent=record)

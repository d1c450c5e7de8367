"""Where a descriptor comes from: the one word that is known at its birth."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Origin", "Word"]


class Word(StrEnum):
    """Hashed in C, as the text that it is: Enum's own hash would be a call of Python."""

    __hash__ = str.__hash__


class Origin(Word):
    """How a descriptor came into the program's hands."""

    CREATED = "created"
    ACCEPTED = "accepted"
    DUPLICATED = "duplicated"
    WRAPPED = "wrapped"
    DETACHED = "detached"
    ADOPTED = "adopted"
    INHERITED = "inherited"
    NATIVE = "native"

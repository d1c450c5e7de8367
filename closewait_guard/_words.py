"""Numbers, times and addresses as people read them: pure."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

__all__ = ["addresses", "count_of", "date", "distinct", "seconds", "span"]

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_ABSURD = 1e9


def count_of(number: int, noun: str) -> str:
    """`1 socket`, `2 sockets`.

    Example:
        >>> count_of(1, "byte"), count_of(12_000, "byte"), count_of(2, "process")
        ('1 byte', '12,000 bytes', '2 processes')
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}" + ("es" if noun.endswith("s") else "s")


def seconds(duration: float) -> str:
    """A duration in the unit that suits it.

    Example:
        >>> [seconds(number) for number in (0.25, 41, 540, 9000, 200_000)]
        ['0.2 s', '41 s', '9 min', '2.5 h', '2.3 days']
    """
    for size, name, limit in ((1, "s", 120), (_MINUTE, "min", _HOUR * 2), (_HOUR, "h", _DAY * 2)):
        if duration < limit:
            return f"{_short(duration / size)} {name}"
    return f"{_short(duration / _DAY)} days"


def date(at: float, zone: str = "%z") -> str:
    """A moment in local time; one that is in no calendar, by its seconds."""
    try:
        return time.strftime(f"%Y-%m-%d %H:%M:%S{zone}", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return f"{at:g} s after 1970"


def span(shortest: float, longest: float) -> str:
    """Two durations as one, where they read alike.

    Example:
        >>> span(41, 540), span(41.1, 41.2)
        ('41 s to 9 min', '41 s')
    """
    first, last = seconds(shortest), seconds(longest)
    return first if first == last else f"{first} to {last}"


def addresses(peers: Iterable[str], most: int = 3) -> str:
    """The most frequent addresses, with counts.

    Example:
        >>> addresses(["10.0.0.1:80", "10.0.0.1:80", "10.0.0.2:80"])
        '10.0.0.1:80 (2), 10.0.0.2:80'
    """
    counted = Counter(peers).most_common()
    shown = [peer if times == 1 else f"{peer} ({times:,})" for peer, times in counted[:most]]
    more = len(counted) - most
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def distinct(values: Iterable[str]) -> list[str]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))


def _short(number: float) -> str:
    if number < 10:
        return f"{number:.1f}".removesuffix(".0")
    return f"{number:.0f}" if number < _ABSURD else f"{number:.3g}"

"""Convert a report to plain data, as in `report.schema.json`, and back without loss. Pure.

Also the report with fewer findings, where all would be too long.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any, TypeVar

from closewait_guard._config import shown
from closewait_guard.exceptions import ReportFormatError
from closewait_guard.model import SCHEMA, ClosedLate, Finding, Report, site_key

__all__ = [
    "from_dict",
    "to_dict",
    "with_examples",
    "with_fewer_examples",
]


# A signed number of 64 bits: what other languages and the platform can hold.
_MAX_INTEGER = 2**63 - 1


def to_dict(report: Report) -> dict[str, Any]:
    """Convert a report to dicts, lists, strings and numbers, ready for JSON.

    Each finding also has `is_leak`, which follows from its verdict.

    Example:
        >>> from closewait_guard import scan
        >>> to_dict(scan())["schema"]
        'closewait-guard/1'
    """
    return typing.cast("dict[str, Any]", _to_plain(report))


def from_dict(data: Mapping[str, Any]) -> Report:
    """Make a report of what `to_dict` has returned.

    Raises:
        ReportFormatError: The data is not a report, or has another schema.
    """
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if schema != SCHEMA:
        raise ReportFormatError(
            f"unsupported report format: expected schema {SCHEMA!r}, got {shown(schema)}"
        )
    try:
        return typing.cast(Report, _build(Report, data, "report"))
    except RecursionError:
        raise ReportFormatError("report is nested too deeply") from None


def _to_plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: _to_plain(getattr(value, item.name)) for item in _fields(type(value))}
        return fields | {"is_leak": value.is_leak} if isinstance(value, Finding) else fields
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _to_plain(item) for name, item in value.items()}
    return value.value if isinstance(value, StrEnum) else value


def _build(kind: Any, data: Any, place: str) -> Any:
    """Make a value of the annotated type, or raise with the place where the data does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _build_any(arguments, data, place)
    if origin is tuple:
        items = _require(list, data, place)
        return tuple(
            _build(arguments[0], item, f"{place}[{number}]") for number, item in enumerate(items)
        )
    if origin is not None:
        values = _require(dict, data, place)
        return {
            _require_scalar(str, name, place): _build(arguments[1], item, f"{place}.{name:.40}")
            for name, item in values.items()
        }
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, data, place)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return _build_enum(kind, data, place)
    return _require_scalar(kind, data, place)


def _build_any(kinds: tuple[Any, ...], data: Any, place: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    candidates = [kind for kind in kinds if kind is not type(None)]
    if len(candidates) == 1:
        return _build(candidates[0], data, place)
    if type(data) in candidates:
        return _require_scalar(type(data), data, place)
    raise _mismatch(" or ".join(kind.__name__ for kind in candidates), data, place)


def _build_dataclass(kind: Any, data: Any, place: str) -> Any:
    values = _require(dict, data, place)
    hints = _hints(kind)
    # A field with a default may be newer than the program that wrote the report.
    missing = [name for name in _required(kind) if name not in values]
    if missing:
        raise ReportFormatError(f"{place}: missing fields {', '.join(missing)}")
    return kind(
        **{
            name: _build(hint, values[name], f"{place}.{name}")
            for name, hint in hints.items()
            if name in values
        }
    )


def _build_enum(kind: type[StrEnum], data: Any, place: str) -> StrEnum:
    try:
        return kind(data)
    except (ValueError, TypeError):
        raise _mismatch(f"one of {', '.join(kind)}", data, place) from None


def _require(kind: type, data: Any, place: str) -> Any:
    if not isinstance(data, kind):
        raise _mismatch(kind.__name__, data, place)
    return data


def _require_scalar(kind: Any, data: Any, place: str) -> Any:
    # JSON writers of other languages drop the ".0" of a whole number.
    if type(data) is not kind and not (kind is float and type(data) is int):
        raise _mismatch(kind.__name__, data, place)
    if type(data) is int and not -_MAX_INTEGER <= data <= _MAX_INTEGER:
        raise _mismatch("a number of at most 64 bits", data, place)
    if type(data) is float and not math.isfinite(data):
        raise _mismatch("a finite number", data, place)
    return float(data) if kind is float else data


def _mismatch(wanted: str, data: Any, place: str) -> ReportFormatError:
    return ReportFormatError(f"{place}: expected {wanted}, got {shown(data)}")


@lru_cache(None)
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@lru_cache(None)
def _required(kind: Any) -> tuple[str, ...]:
    return tuple(item.name for item in _fields(kind) if item.default is dataclasses.MISSING)


@lru_cache(None)
def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


def with_fewer_examples(report: Report) -> Iterator[Report]:
    """The report with ever fewer findings of each site, down to one, for who needs a short one."""
    for max_per_site in (1000, 50, 5, 1):
        report = with_examples(report, max_per_site)
        yield report


_Item = TypeVar("_Item", Finding, ClosedLate)


def with_examples(report: Report, max_per_site: int) -> Report:
    """Keep at most so many findings of each site: those whose connections ended first.

    The first of them counts those that were left out. Without a stack only the peers distinguish
    the findings, so all of those are kept.
    """
    return dataclasses.replace(
        report,
        findings=_sample_by_site(
            report.findings, max_per_site, lambda finding: finding, _age, _with_count
        ),
        closed_late=_sample_by_site(
            report.closed_late,
            max_per_site,
            lambda closed: closed.finding,
            lambda closed: closed.after,
            lambda closed, count: dataclasses.replace(
                closed, finding=_with_count(closed.finding, count)
            ),
        ),
    )


def _sample_by_site(
    items: Sequence[_Item],
    max_per_site: int,
    finding_of: Callable[[_Item], Finding],
    age_of: Callable[[_Item], float],
    with_count: Callable[[_Item, int], _Item],
) -> tuple[_Item, ...]:
    groups: dict[object, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(site_key(finding_of(item)), []).append(place)
    kept: dict[int, _Item] = {}
    for places in groups.values():
        if (
            len(places) > max_per_site
            and finding_of(items[places[0]]).observation.record.site is not None
        ):
            total = sum(finding_of(items[place]).count for place in places)
            oldest = sorted(places, key=lambda place: -age_of(items[place]))[:max_per_site]
            others = sum(finding_of(items[place]).count for place in oldest[1:])
            kept[oldest[0]] = with_count(items[oldest[0]], total - others)
        else:
            oldest = places
        for place in oldest:
            kept.setdefault(place, items[place])
    return tuple(kept[place] for place in sorted(kept))


def _age(finding: Finding) -> float:
    return finding.observation.ended_for


def _with_count(finding: Finding, count: int) -> Finding:
    return dataclasses.replace(finding, count=count)

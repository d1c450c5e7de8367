"""What has changed from one report to another, site by site, as text: pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from closewait_guard._block import block
from closewait_guard._lines import folded
from closewait_guard._outside import peer_of
from closewait_guard.model import Leak, Report, SiteGroup

__all__ = ["difference"]


def difference(before: Report, after: Report) -> Iterator[str]:
    """Lines: how many sites are new, growing, shrinking and gone, then each of them."""
    old, new = _by_name(before), _by_name(after)
    changes = {name: new[name].count - old[name].count for name in new if name in old}
    kinds = {
        "NEW": [name for name in new if name not in old],
        "GROWING": [name for name, change in changes.items() if change > 0],
        "SHRINKING": [name for name, change in changes.items() if change < 0],
        "GONE": [name for name in old if name not in new],
        "UNCHANGED": [name for name, change in changes.items() if not change],
    }
    told = [f"{len(names)} {kind.lower()}" for kind, names in kinds.items() if names]
    sockets = f"{before.open_sockets:,} open sockets then, {after.open_sockets:,} now"
    descriptors = f"{_used(before)} descriptors then, {_used(after)} now"
    yield from folded(f"Sites: {', '.join(told) or 'none'}; {sockets}; {descriptors}", "  ")
    for kind, names in kinds.items():
        for name in names if kind != "UNCHANGED" else ():
            yield ""
            yield from _told(kind, old.get(name), new.get(name))


def _told(kind: str, old: SiteGroup | None, new: SiteGroup | None) -> Iterator[str]:
    group = new or old
    if group is None:
        return
    if old and new:
        change = new.count - old.count
        kind += f", from {old.count:,} to {new.count:,} ({change:+,})"
    yield f"{kind}:"
    yield from block(group)


def _by_name(report: Report) -> dict[str, SiteGroup]:
    """By what names a site in whatever process; without a stack, the peers tell sites apart."""
    groups: dict[str, SiteGroup] = {}
    for group in report.by_site():
        if not group.verdict.accused:
            # What is closing at one moment is gone at the next, and no news.
            continue
        if group.site is None:
            groups |= {f"{group.fingerprint} {peer}": part for peer, part in _by_peer(group)}
        else:
            groups[group.fingerprint] = group
    return groups


def _by_peer(group: SiteGroup) -> Iterator[tuple[str, SiteGroup]]:
    peers: dict[str, list[Leak]] = {}
    for leak in group.leaks:
        peers.setdefault(peer_of(leak.observation), []).append(leak)
    for peer, leaks in peers.items():
        yield peer, replace(group, leaks=tuple(leaks))


def _used(report: Report) -> str:
    return "an unknown number of" if report.fd_used is None else f"{report.fd_used:,}"

"""What lies where in this process's memory, and what may be written there."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True, slots=True)
class Range:
    """Addresses [start, end) that belong to ``owner``, a number."""

    start: int
    end: int
    owner: int


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch that the system has mapped, of a file or of none."""

    start: int
    end: int
    writable: bool
    path: str


def regions() -> list[Region]:
    """This process's memory in ascending order; empty where the system is not Linux."""
    try:
        # the name of a mapped file may be any bytes
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.split(maxsplit=5) for line in file]
    except OSError:
        return []
    result = []
    for span, permissions, _offset, _device, _inode, *path in lines:
        start, end = (int(x, 16) for x in span.split("-"))
        result.append(Region(start, end, "w" in permissions, path[0].strip() if path else ""))
    return result


def read_only(ranges: Iterable[Range]) -> tuple[Range, Region] | None:
    """The first range that reaches into memory that cannot be written, and that memory."""
    mapped = regions()
    starts = [region.start for region in mapped]
    for found in ranges:
        at = max(bisect.bisect_right(starts, found.start) - 1, 0)
        while at < len(mapped) and mapped[at].start < found.end:
            if mapped[at].end > found.start and not mapped[at].writable:
                return found, mapped[at]
            at += 1
    return None


def overlapping(ranges: Iterable[Range]) -> set[int]:
    """Owners of ranges that reach into each other; without them all others are apart."""
    owners: set[int] = set()
    furthest, owner = 0, -1
    for found in sorted(ranges):
        if found.start < furthest:
            owners |= {found.owner, owner}
        if found.end > furthest:
            furthest, owner = found.end, found.owner
    return owners

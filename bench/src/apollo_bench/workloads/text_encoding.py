"""What the bytes of a text say about its encoding and its line ends."""

from __future__ import annotations

MARK = b"\xef\xbb\xbf"  # the byte order mark that some editors put before UTF-8
_START = 64  # bytes
_MAX_SHARE = 0.1  # of carriage returns alone, in lines


def utf16_error(start: bytes) -> str | None:
    """Return what is wrong with a text that begins as UTF-16 or UTF-32 does; None otherwise.

    Args:
        start: the first bytes of the text.
    """
    marked = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    # without a mark: every other byte of Latin letters is zero
    first, second = start[:_START:2], start[1:_START:2]
    unmarked = len(start) >= 4 and any(
        not any(one) and all(other) for one, other in ((first, second), (second, first))
    )
    if not marked and not unmarked:
        return None
    return "UTF-16, not UTF-8; convert it, for example with iconv -f UTF-16 -t UTF-8"


def line_end_error(returns: int, lines: int) -> str | None:
    """Return what is wrong with the line ends of a text; None if nothing is.

    Some corpora have a few carriage returns within sentences, which are white space.

    Args:
        returns: number of carriage returns that are not before a line feed.
        lines: number of line feeds.
    """
    if returns <= max(1, _MAX_SHARE * lines):
        return None
    return (
        f"lines end in carriage returns alone (\\r): {returns:,}, beside {lines:,} line feeds "
        "(\\n); convert them to line feeds"
    )

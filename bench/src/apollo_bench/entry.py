"""Entry point of the command line: handle Ctrl-C and any terminal before the slow imports."""

from __future__ import annotations

import codecs
import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType

_SHOW_CURSOR = b"\x1b[?25h"  # progress bars hide it
# for terminals that have ASCII only
_SPELLED = {
    "±": "+-", "…": "...", "×": "x", "–": "-", "—": "-", "σ": "sigma", "\N{NO-BREAK SPACE}": " "
}  # fmt: skip


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, _stop)
    codecs.register_error("apollo-bench", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="apollo-bench")
    from apollo_bench.cli import app  # takes about a second

    app(prog_name="apollo-bench")


def _stop(number: int, frame: FrameType | None) -> None:
    """Exit at once: an import or a destructor would swallow an exception.

    Every file is written atomically. Code that must shut down in order, such as training, catches
    signals itself.
    """
    cursor = _SHOW_CURSOR if os.isatty(2) else b""
    os.write(2, cursor + b"\nStopped.\n")
    os._exit(128 + number)


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return what is printed for a character that the terminal does not have."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    if all("\udc80" <= character <= "\udcff" for character in text):  # of a path that is not UTF-8
        return text.encode("ascii", "surrogateescape"), error.end
    return "".join(_SPELLED.get(character, "?") for character in text), error.end

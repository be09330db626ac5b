"""Read lines of words by hand, because libraries accept truncated and wrongly encoded text.

Errors name file and line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from apollo_bench.errors import ExperimentError
from apollo_bench.regular_files import open_regular
from apollo_bench.workloads.gzip_files import open_binary
from apollo_bench.workloads.text_encoding import MARK, line_end_error, utf16_error

_BLOCK = 1 << 21  # bytes


def blocks(path: Path) -> Iterator[list[list[bytes]]]:
    """Yield the words of a file's lines, some thousand lines at a time, checked to be UTF-8.

    Words are separated by white space. They are bytes, which takes half the time of str. An empty
    line is an empty list.

    Raises:
        ExperimentError: the file cannot be read, is cut short within a line, or is not UTF-8.
    """
    line = 1
    try:
        with open_regular(path) as file:
            while block := file.read(_BLOCK):
                block += file.readline()
                check_encoding(block, path, line)
                if not block.endswith(b"\n"):
                    last = line + block.count(b"\n")
                    raise ExperimentError(
                        f"{path}, line {last}: the file ends within it, truncated; unpack it again"
                    )
                lines = [text.split() for text in block[:-1].split(b"\n")]
                line += len(lines)
                yield lines
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror})") from None


def gzipped_lines(path: Path, remedy: str) -> list[list[str]]:
    """Return the words of each line of a gzipped text; empty lines are empty lists.

    Raises:
        ExperimentError: the file cannot be read, is damaged or truncated, or is not UTF-8.
    """
    return [line.split() for line in read_text(path, remedy, plain=False)]


def read_text(path: Path, remedy: str, plain: bool = True) -> list[str]:
    """Return the lines of a gzipped text, or if ``plain`` also of an uncompressed one.

    Raises:
        ExperimentError: as in ``gzipped_lines``.
    """
    with open_binary(path, remedy, plain=plain) as file:
        content = file.read().removeprefix(MARK)
    check_encoding(content, path, 1)
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [line.decode() for line in lines]


def check_encoding(content: bytes, path: Path, line: int) -> None:
    """Check that bytes are UTF-8 text.

    Args:
        content: the bytes.
        path: file, for the error.
        line: number of the first line of the bytes.

    Raises:
        ExperimentError: the bytes are not UTF-8, contain a zero byte as a broken copy does, or have
            lines that end in carriage returns alone; the message names the line.
    """
    if line == 1 and (error := utf16_error(content)):
        raise ExperimentError(f"{path}: {error}")
    returns = content.count(b"\r") - content.count(b"\r\n")
    if problem := line_end_error(returns, content.count(b"\n")):
        raise ExperimentError(f"{path}, line {line}: {problem}")
    if b"\0" in content:
        line += content.count(b"\n", 0, content.index(b"\0"))
        raise ExperimentError(f"{path}, line {line}: a zero byte, damaged; unpack it again")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise ExperimentError(
            f"{path}, line {line}: not UTF-8 (byte 0x{content[error.start]:02x}); convert the file"
        ) from None

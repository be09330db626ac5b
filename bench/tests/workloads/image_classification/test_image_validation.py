"""Damaged image files are found before training, and intact ones pass."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from apollo_bench.workloads.image_classification.image_validation import check_image_file
from bench.tests.image_trees import jpeg, photograph


def image_file_error(path: Path) -> str | None:
    return check_image_file(path)[0]


def saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def with_thumbnail() -> bytes:
    """Return a JPEG whose header holds a complete JPEG with its own end marker."""
    content = jpeg(photograph(1, 64, 48))
    inner = b"Exif\x00\x00" + jpeg(photograph(2, 16, 16))
    return content[:2] + b"\xff\xe1" + (len(inner) + 2).to_bytes(2, "big") + inner + content[2:]


WHOLE = {
    "jpeg": jpeg(photograph(1, 64, 48)),
    "progressive": jpeg(photograph(1, 64, 48), progressive=True),
    "thumbnail": with_thumbnail(),
    "grey": jpeg(photograph(1, 64, 48).convert("L")),
    # both are among ImageNet's JPEG files
    "cmyk": jpeg(photograph(1, 64, 48).convert("CMYK")),
    "png": saved(photograph(1, 64, 48), "PNG"),
    "bmp": saved(photograph(1, 64, 48), "BMP"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.JPEG"
    path.write_bytes(WHOLE[kind])
    assert image_file_error(path) is None
    path.write_bytes(WHOLE[kind] + bytes(100))
    assert image_file_error(path) is None


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("missing", [1, 100, 0.5, 0.9, 0.999])
def test_files_cut_short(tmp_path: Path, kind: str, missing: float) -> None:
    path = tmp_path / "image.JPEG"
    content = WHOLE[kind]
    lost = round(missing * len(content)) if missing < 1 else int(missing)
    path.write_bytes(content[: len(content) - lost])
    assert image_file_error(path) is not None
    if kind != "bmp":  # zeros, as at the end of an interrupted download
        path.write_bytes(content[: len(content) - lost] + bytes(lost))
        assert image_file_error(path) is not None


def test_damage_inside(tmp_path: Path) -> None:
    path = tmp_path / "image.JPEG"
    content = bytearray(WHOLE["png"])
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert (
        image_file_error(path)
        == "not a whole image (broken PNG file (bad header checksum in b'IDAT'))"
    )
    content = bytearray(WHOLE["jpeg"])
    tables = content.index(b"\xff\xc4")  # the Huffman tables, without which nothing is decoded
    content[tables + 5 : tables + 21] = bytes([255] * 16)
    path.write_bytes(content)
    assert str(image_file_error(path)).startswith("not a")


def test_messages_name_the_fault_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "image.JPEG"
    assert image_file_error(path) == "cannot be read (No such file or directory)"
    path.write_bytes(b"")
    assert image_file_error(path) == "empty"
    path.write_bytes(b"<html>404 Not Found</html>")
    assert image_file_error(path) == "not an image"
    content = WHOLE["jpeg"][:-1]
    path.write_bytes(content)
    assert image_file_error(path) == (
        f"cut short: {len(content)} bytes without the mark that ends its format"
    )
    path.unlink()
    path.mkdir()
    assert image_file_error(path) == "cannot be read (Is a directory)"

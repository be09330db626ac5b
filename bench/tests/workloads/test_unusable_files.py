"""Files that would block, fill the memory or lose data if read carelessly."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from apollo_bench.config import recipe
from apollo_bench.config.execution import Execution
from apollo_bench.errors import ExperimentError
from apollo_bench.launch import run_experiment
from apollo_bench.workloads import gzip_files
from apollo_bench.workloads.image_classification import cifar10, fashion_mnist, imagenet
from apollo_bench.workloads.image_classification.image_decoding import MAX_PIXELS, decode
from apollo_bench.workloads.image_classification.image_validation import image_error
from apollo_bench.workloads.image_classification.safe_unpickle import unpickle_arrays
from apollo_bench.workloads.language_modeling import (
    one_billion_word,
    text_files,
    vocabulary,
    wordnet,
)
from apollo_bench.workloads.translation import multi30k
from apollo_bench.workloads.translation.parallel_text import read_lines
from bench.tests.image_trees import WNIDS, write_tree
from bench.tests.workloads.image_classification.test_cifar10 import write_archive, write_pickles
from bench.tests.workloads.language_modeling.test_one_billion_word import write_raw


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_tree(tmp_path / "imagenet")


def pipe(path: Path) -> Path:
    """Replace a file by a pipe that nobody writes to."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("data_batch_1", cifar10.load),
        ("cifar_train.parquet", cifar10.load),
        (fashion_mnist.FILES[0], fashion_mnist.load),
        (wordnet.FILES[0], wordnet.load),
        ("words.txt", lambda root: vocabulary.read(root / "words.txt")),
        ("train.en", multi30k.load),
        ("own.toml", lambda root: recipe.load(str(root / "own.toml"))),
    ],
)
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str, load: Callable[[Path], Any]) -> None:
    path = pipe(tmp_path / name)
    for other in ("train.de", "cifar_test.parquet"):
        (tmp_path / other).write_text("eins\n")
    with pytest.raises(ExperimentError, match=rf"{path.name}.*Not a regular file"):
        load(tmp_path)


def test_a_pipe_among_images(tree: Path) -> None:
    path = pipe(tree / "val" / WNIDS[0] / "pipe.JPEG")
    with pytest.raises(ExperimentError, match=rf"{path}: cannot be read \(Not a regular file"):
        imagenet.load(tree)


def test_a_pipe_among_shards_of_text(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    shard = pipe(next((raw / one_billion_word.TRAIN).iterdir()))
    with pytest.raises(
        ExperimentError, match=rf"{shard.name}: cannot be read \(Not a regular file"
    ):
        one_billion_word.prepare(raw, tmp_path / "out", None, 1, lambda *news: None)


def test_a_link_to_itself(tree: Path) -> None:
    loop = tree / "train" / WNIDS[1] / "loop.JPEG"
    loop.symlink_to(loop.name)
    with pytest.raises(ExperimentError, match=r"loop.JPEG: cannot be read \(Too many levels of"):
        imagenet.load(tree)


def blank_png(side: int) -> bytes:
    """Return a black-and-white PNG of a few kilobytes, however large its side."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes((side + 7) // 8 + 1) * side)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_picture_of_too_many_pixels_is_not_decoded(side: int) -> None:
    """Pillow warns above its limit and refuses above twice the limit."""
    content = blank_png(side)
    error = image_error(content)
    assert error is not None
    assert error.endswith(f"pixels, allowed are {MAX_PIXELS:,}; scale it down")
    with pytest.raises(ExperimentError, match=r"big.png: it has .* pixels, allowed are"):
        decode(content, "big.png")


def encoded(pixels: numpy.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def test_grey_of_16_bits_keeps_its_shades() -> None:
    shades = numpy.arange(0, 65536, 1021, dtype=numpy.uint16).reshape(5, 13)
    content = encoded(shades)
    assert image_error(content) is None
    found = numpy.asarray(decode(content, "grey.png"))
    for channel in range(3):
        assert (found[..., channel] == shades // 256).all()


def with_significant_bits(content: bytes, bits: bytes) -> bytes:
    """Return a PNG with a chunk of significant bits behind its header."""
    chunk = b"sBIT" + bits
    stated = struct.pack(">I", len(bits)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content[:33] + stated + content[33:]


SHADES = numpy.arange(0, 4096, 65, dtype=numpy.uint16).reshape(8, 8)  # of 12 bits


@pytest.mark.parametrize("samples", [SHADES, SHADES << 4, SHADES << 4 | SHADES >> 8])
def test_a_png_of_12_bits_in_16_keeps_its_shades(samples: Any) -> None:
    """The significant bits are the lower or, as the standard wants, the upper ones."""
    content = with_significant_bits(encoded(samples), b"\x0c")
    assert image_error(content) is None
    assert (numpy.asarray(decode(content, "grey.png"))[..., 0] == SHADES >> 4).all()
    dark = samples // 40  # a dark picture
    content = with_significant_bits(encoded(dark), b"\x0c")
    if samples is SHADES:
        assert (numpy.asarray(decode(content, "grey.png"))[..., 0] == dark >> 4).all()


@pytest.mark.parametrize("bits", [10, 12])
def test_a_tiff_that_states_its_range_keeps_its_shades(bits: int) -> None:
    buffer = io.BytesIO()
    shades = SHADES >> (12 - bits)
    Image.fromarray(shades).save(buffer, "TIFF", tiffinfo={281: (1 << bits) - 1})
    assert image_error(buffer.getvalue()) is None
    found = numpy.asarray(decode(buffer.getvalue(), "grey.tif"))
    assert (found[..., 0] == shades >> (bits - 8)).all()


def color_of_16_bits(samples: Any) -> bytes:
    """Return a PNG with 16 bits per channel, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    height, width = samples.shape
    rows = numpy.repeat(samples.astype(">u2")[..., None], 3, 2)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("make", "kind"), [(encoded, "PNG"), (encoded, "TIFF"), (color_of_16_bits, "PNG")]
)
def test_pixels_of_12_bits_in_16_are_refused_if_the_file_does_not_say_so(
    make: Callable[..., bytes], kind: str
) -> None:
    def write(samples: Any) -> bytes:
        return make(samples, kind) if make is encoded else make(samples)

    content = write(SHADES)
    error = image_error(content)
    assert error is not None
    assert error.startswith("its pixels have 16 bits and use less than a sixteenth of their range")
    with pytest.raises(ExperimentError, match=r"x.png: its pixels have 16 bits and use less"):
        decode(content, "x.png")
    full = write(SHADES << 4)
    assert image_error(full) is None
    assert (numpy.asarray(decode(full, "x.png"))[..., 1] == SHADES >> 4).all()


def test_a_black_picture_of_16_bits_is_black() -> None:
    content = encoded(numpy.zeros((3, 3), numpy.uint16))
    assert image_error(content) is None
    assert not numpy.asarray(decode(content, "black.png")).any()


@pytest.mark.parametrize("kind", [numpy.float32, numpy.int32])
def test_pixels_of_an_unknown_range_are_refused(kind: type) -> None:
    content = encoded(numpy.full((4, 4), 1000, kind), "TIFF")
    assert (
        image_error(content) == "its pixels have 32 bits and no known range; convert it to 8 bits"
    )
    with pytest.raises(ExperimentError, match=r"x.tif: its pixels have 32 bits"):
        decode(content, "x.tif")


def test_files_that_are_not_used_are_counted(tree: Path) -> None:
    folder = tree / "train" / WNIDS[0]
    for number in range(3):
        (folder / f"{number}.WebP").write_bytes(b"an image too")
    (folder / "README").write_text("about them")
    (folder / "._0.JPEG").write_bytes(b"of an operating system")
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / "more" / "deep" / "1.jpg").write_bytes(b"a nested image")
    (folder / "named.jpeg").mkdir()
    (tree / "val" / "list.txt").write_text("beside")
    (tree / "labels.csv").write_text("beside the splits")
    (tree / "test" / "deep").mkdir(parents=True)
    (tree / "test" / "deep" / "1.jpg").write_bytes(b"not a split of ImageNet")
    (tree / "val" / ".ipynb_checkpoints").mkdir()
    (tree / "val" / ".ipynb_checkpoints" / "1.jpg").write_bytes(b"a copy")
    images = imagenet.load(tree)
    assert len(images.train.labels) == 12
    [remark] = images.remarks
    assert remark == (
        "Files of imagenet that are not used: 10 (3 .webp, 1 beside the folders of classes, "
        "1 beside the splits, 1 hidden, 1 in folders below, 1 in hidden folders, 1 in other "
        "folders, 1 without an ending). Used are .jpeg, .jpg, .png in the folders of the classes."
    )


def test_unused_files_are_reported_before_training(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "train" / WNIDS[0] / "1.bmp").write_bytes(b"an image too")
    sizes = ["data.size=8", "data.test_resize=8", "train.batch_size=4"]
    spec = recipe.load("imagenet", sizes).run("sgd", 1)
    machines = run_experiment.Machines("cpu", 1, 1, 1, "ddp")
    request = run_experiment.Request([spec], tmp_path / "out", tree, machines)
    said: list[str] = []
    [run] = run_experiment._prepare(request, Execution(), said.append)
    assert [text[:50] for text in said] == ["Files of imagenet that are not used: 1 (1 .bmp). U"]
    data = run.directory.read()["data"]
    assert data["remarks"] == said
    assert data["published"] is False  # a report with the paper's numbers says so
    monkeypatch.setattr(imagenet, "_PUBLISHED", (3, 12, 6))
    request = request._replace(out=tmp_path / "published")
    [run] = run_experiment._prepare(request, Execution(), said.append)
    assert run.directory.read()["data"]["published"] is True


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzip_files, "_MIN_LIMIT", 1 << 16)


@pytest.mark.usefixtures("small_limit")
def test_what_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(1 << 20))
    for name in (*fashion_mnist.FILES, cifar10.ARCHIVE, wordnet.FILES[0], "train.en.gz"):
        (tmp_path / name).write_bytes(bomb)
    for load in (
        lambda: fashion_mnist.load(tmp_path),
        lambda: cifar10.load(tmp_path / cifar10.ARCHIVE),
        lambda: text_files.gzipped_lines(tmp_path / wordnet.FILES[0], "mend it"),
        lambda: read_lines(tmp_path / "train.en.gz", "mend it"),
    ):
        with pytest.raises(ExperimentError, match=r"it unpacks to more than \d+,\d+ bytes"):
            load()
    (tmp_path / "train.en.gz").write_bytes(gzip.compress(b"one\n" * 10_000))  # below the limit
    assert len(read_lines(tmp_path / "train.en.gz", "mend it")) == 10_000


def test_a_sparse_member_of_an_archive_is_refused(tmp_path: Path) -> None:
    """The member is tiny in the archive and unpacks to a terabyte of zeros."""
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo(f"{cifar10.FOLDER}/data_batch_1")
        member.pax_headers = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": "0,0"}
        archive.addfile(member)
    with pytest.raises(ExperimentError, match=r"not a whole archive \(data_batch_1 has 1,099,511"):
        cifar10.load(path)
    write_archive(path)
    cifar10.load(path)


NUMPY = b"cnumpy\n"
BYTES = b"c_codecs\nencode\n(V%s\nVlatin1\ntR"
OBJECTS = NUMPY + b"dtype\n(VO8\nI0\nI1\ntR"


@pytest.mark.parametrize(
    "content",
    [
        # an array whose element is the object at an address that the file chooses
        NUMPY + b"ndarray\n((I1\nt" + OBJECTS + BYTES % (b"B" * 8) + b"tR.",
        NUMPY + b"dtype\n(VO\ntR.",
        NUMPY + b"dtype\n(Vu1,O\ntR.",
        NUMPY + b"dtype\n((l(Vx\nVO\ntatR.",
        NUMPY + b"dtype\n(VM8[s]\ntR.",
    ],
    ids=["address", "objects", "record", "record as a list", "times"],
)
def test_a_pickle_gets_arrays_of_numbers_only(tmp_path: Path, content: bytes) -> None:
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        unpickle_arrays(content)
    folder = write_pickles(tmp_path / "set")
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(ExperimentError, match=r"data_batch_1: not a whole pickle"):
        cifar10.load(folder)


@pytest.mark.parametrize("shape", [b"(I-2\nI-8\nt", b"(I1\nI8\nt", b"(I2305843009213693952\nI8\nt"])
def test_an_array_has_the_bytes_of_its_shape(shape: bytes) -> None:
    start = b"cnumpy.core.multiarray\n_reconstruct\n(" + NUMPY + b"ndarray\n(I0\ntVb\ntR(I1\n"
    kind = NUMPY + b"dtype\n(Vu1\nI0\nI1\ntRI00\n"

    def pickled(shape: bytes) -> bytes:
        return start + shape + kind + BYTES % (b"A" * 16) + b"tb."

    assert unpickle_arrays(pickled(b"(I2\nI8\nt")).tolist() == [[65] * 8] * 2
    with pytest.raises(pickle.UnpicklingError, match="without the bytes of its numbers"):
        unpickle_arrays(pickled(shape))


def test_numbers_of_every_kind_and_order() -> None:
    for kind in ("u1", "<i2", ">i4", ">f8", "?", "<f2"):
        for order in ("C", "F"):
            array = numpy.array([[0, 1, 1], [1, 0, 1]], numpy.dtype(kind), order=order)  # type: ignore[call-overload]
            for protocol in (0, 2, 4):
                content = pickle.dumps(array, protocol)
                found = unpickle_arrays(content)
                assert found.dtype == pickle.loads(content).dtype
                assert (found == array).all()


def test_a_zero_byte_in_a_text(tmp_path: Path) -> None:
    path = tmp_path / "train.en"
    path.write_bytes(b"one\ntw" + bytes(4096) + b"o\n")
    with pytest.raises(ExperimentError, match=r"train.en, line 2: a zero byte, damaged; mend it"):
        read_lines(path, "mend it")


def test_lines_that_end_in_carriage_returns(tmp_path: Path) -> None:
    """Otherwise one side of a translation, or a text, would be a single line."""
    path = tmp_path / "train.en"
    path.write_bytes(b"one two\rthree\rfour\r")
    with pytest.raises(ExperimentError, match=r"train.en: lines end in carriage returns alone"):
        read_lines(path, "mend it")
    with pytest.raises(ExperimentError, match=r"train.en, line 1: lines end in carriage returns"):
        list(text_files.blocks(path))
    zipped = tmp_path / "train.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ExperimentError, match=r"train.gz, line 1: lines end in carriage returns"):
        text_files.gzipped_lines(zipped, "mend it")
    # carriage returns of Windows, and one within a sentence
    path.write_bytes(b"one two\r\nthree \r four\r\nfive\r\n")
    assert read_lines(path, "mend it") == ["one two", "three four", "five"]
    assert [len(line) for lines in text_files.blocks(path) for line in lines] == [2, 2, 1]

    # a file that was put together from two
    path.write_bytes(b"one\n" * 40 + b"two\r" * 10)
    for read in (lambda: read_lines(path, ""), lambda: list(text_files.blocks(path))):
        with pytest.raises(ExperimentError, match=r"returns alone \(\\r\): 10, beside 4[01] line"):
            read()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_utf_16(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "train.en"
    path.write_bytes("one two\nthree\n".encode(encoding))
    for read in (
        lambda: read_lines(path, "mend it"),
        lambda: text_files.read_text(path, "mend it"),
        lambda: list(text_files.blocks(path)),
    ):
        with pytest.raises(ExperimentError, match=r"train.en: UTF-16, not UTF-8; convert it"):
            read()

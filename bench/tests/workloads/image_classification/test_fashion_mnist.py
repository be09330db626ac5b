"""The embedded data, their checks, and augmentation."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.image_classification import fashion_mnist
from apollo_bench.workloads.image_classification.augmentation import crop_and_flip, draw_shifts
from apollo_bench.workloads.image_classification.in_memory_images import pixel_statistics

SCRIPT = Path(__file__).parents[4] / "scripts" / "make_fashion_mnist.py"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(fashion_mnist.EMBEDDED, folder)
    return folder


def idx(path: Path, shape: tuple[int, ...], values: bytes) -> None:
    header = bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape)
    path.write_bytes(gzip.compress(header + values))


def small_set(folder: Path) -> Path:
    folder.mkdir()
    for split, count in (("train", 6), ("t10k", 4)):
        values = bytes(range(count * 4))
        idx(folder / f"{split}-images-idx3-ubyte.gz", (count, 2, 2), values)
        idx(folder / f"{split}-labels-idx1-ubyte.gz", (count,), bytes(range(count)))
    return folder


def test_embedded_set_is_balanced_and_small() -> None:
    images = fashion_mnist.load()
    assert images.train_images.shape == (8000, 1, 28, 28)
    assert images.test_images.shape == (2000, 1, 28, 28)
    assert images.train_images.dtype == images.test_images.dtype == torch.uint8
    assert images.train_labels.bincount().tolist() == [800] * 10
    assert images.test_labels.bincount().tolist() == [200] * 10
    assert sum(path.stat().st_size for path in fashion_mnist.EMBEDDED.iterdir()) <= 5_000_000
    assert "MIT License" in (fashion_mnist.EMBEDDED / "LICENSE").read_text()


@pytest.mark.slow
def test_script_makes_the_same_bytes(tmp_path: Path) -> None:
    # the subset has 800 images per class, so that the script takes all of them
    subprocess.run(
        [sys.executable, SCRIPT, "--source", fashion_mnist.EMBEDDED, "--target", tmp_path],
        check=True,
        capture_output=True,
    )
    for name in fashion_mnist.FILES:
        made = (tmp_path / name).read_bytes()
        assert made == (fashion_mnist.EMBEDDED / name).read_bytes(), name
        assert made[4:8] == bytes(4), "the time in the gzip header"


@pytest.mark.parametrize("name", fashion_mnist.FILES)
def test_one_changed_byte_is_found(copy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    monkeypatch.setattr(fashion_mnist, "EMBEDDED", copy)
    with pytest.raises(ExperimentError, match=f"{name}: corrupt.*reinstall"):
        fashion_mnist.load()


@pytest.mark.parametrize("name", [fashion_mnist.FILES[0], "SHA256SUMS"])
def test_missing_embedded_file(copy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / name).unlink()
    monkeypatch.setattr(fashion_mnist, "EMBEDDED", copy)
    with pytest.raises(ExperimentError, match=f"{name}: .*reinstall"):
        fashion_mnist.load()


def test_local_folder(tmp_path: Path) -> None:
    images = fashion_mnist.load(small_set(tmp_path / "set"))
    assert images.train_images[1, 0].tolist() == [[4, 5], [6, 7]]
    assert images.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert images.test_images.shape == (4, 1, 2, 2)
    assert images.fingerprint != fashion_mnist.load().fingerprint


@pytest.mark.parametrize("kept", [0, 5, 30, 54])
def test_truncated_file_of_a_local_folder(tmp_path: Path, kept: int) -> None:
    folder = small_set(tmp_path / "set")
    path = folder / fashion_mnist.FILES[0]
    whole = path.read_bytes()
    assert kept < len(whole)
    path.write_bytes(whole[:kept])
    with pytest.raises(
        ExperimentError, match=rf"{path.name}: (not|cannot be read whole) .*--data needs"
    ):
        fashion_mnist.load(folder)


def test_wrong_content_of_a_local_folder(tmp_path: Path) -> None:
    folder = small_set(tmp_path / "set")
    labels, images = folder / fashion_mnist.FILES[1], folder / fashion_mnist.FILES[0]
    idx(labels, (6,), bytes([0, 1, 2, 3, 4, 10]))
    with pytest.raises(ExperimentError, match=f"{labels.name}: label 10, allowed are 0 to 9"):
        fashion_mnist.load(folder)
    idx(labels, (5,), bytes(5))
    with pytest.raises(ExperimentError, match=f"{labels.name}: 5 labels for 6 images"):
        fashion_mnist.load(folder)
    idx(images, (6, 2, 2), bytes(23))
    with pytest.raises(ExperimentError, match=f"{images.name}: the header promises 24 values"):
        fashion_mnist.load(folder)
    idx(images, (24,), bytes(24))
    with pytest.raises(ExperimentError, match=f"{images.name}: not an IDX file of 3-dim"):
        fashion_mnist.load(folder)
    images.unlink()
    with pytest.raises(ExperimentError, match=f"{images.name}: no such file"):
        fashion_mnist.load(folder)


def test_each_cropped_image_is_a_shift_perhaps_mirrored() -> None:
    images = torch.randint(1, 256, (64, 2, 5, 6), dtype=torch.uint8)
    before = images.clone()
    shifts = draw_shifts(64, 2, True, torch.Generator().manual_seed(0))
    cut = crop_and_flip(images, shifts, 2)
    assert torch.equal(images, before)
    assert cut.shape == images.shape
    assert cut.dtype == torch.uint8
    framed = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for picture, frame in zip(cut, framed, strict=True):
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            for window in [frame[:, top : top + 5, left : left + 6]]
            if torch.equal(picture, window.flip(2) if flip else window)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {flip for _, _, flip in seen} == {False, True}


def test_no_augmentation_leaves_the_images() -> None:
    images = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8)
    shifts = draw_shifts(8, 0, False, torch.Generator())
    assert torch.equal(crop_and_flip(images, shifts, 0), images)


def test_statistics_of_the_pixels() -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    images[:, 1] //= 3
    mean, std = pixel_statistics(images)
    pixels = images.double() / 255
    torch.testing.assert_close(mean, pixels.mean(dim=(0, 2, 3), keepdim=True).float())
    torch.testing.assert_close(std, pixels.std(dim=(0, 2, 3), keepdim=True).float())

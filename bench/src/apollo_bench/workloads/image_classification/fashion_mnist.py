"""Fashion-MNIST: the embedded subset, or the full set from a folder of four IDX files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.checksums import find_files
from apollo_bench.workloads.image_classification.idx_format import read_idx
from apollo_bench.workloads.image_classification.image_set import ImageSet

EMBEDDED = Path(__file__).parent / "embedded" / "fashion_mnist"
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
FILES = (
    *("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    *("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
)


def load(folder: Path | None = None) -> ImageSet:
    """Read and check the four files.

    Args:
        folder: folder of the four gzipped IDX files, as in Debian's package; None: the embedded
            subset, whose checksums are verified.

    Raises:
        ExperimentError: a file is missing, corrupt or truncated, or the four do not fit together.
    """
    needed = f"the four files {', '.join(FILES)}, as in Debian's dataset-fashion-mnist"
    folder, digests, remedy = find_files(folder, EMBEDDED, FILES, "make_fashion_mnist.py", needed)
    train_images, train_labels = _split(folder, FILES[0], FILES[1], remedy)
    test_images, test_labels = _split(folder, FILES[2], FILES[3], remedy)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ExperimentError(
            f"{folder}: training images are {tuple(train_images.shape[1:])}, "
            f"test images {tuple(test_images.shape[1:])}; {remedy}"
        )
    fingerprint = hashlib.sha256("".join(digests[name] for name in FILES).encode()).hexdigest()
    return ImageSet(train_images, train_labels, test_images, test_labels, fingerprint)


def _split(folder: Path, images: str, labels: str, remedy: str) -> tuple[Tensor, Tensor]:
    pixels = read_idx(folder / images, 3, remedy)
    classes = read_idx(folder / labels, 1, remedy)
    if len(pixels) != len(classes):
        raise ExperimentError(
            f"{folder / labels}: {len(classes)} labels for {len(pixels)} images; {remedy}"
        )
    if int(classes.max()) >= len(CLASSES):
        raise ExperimentError(
            f"{folder / labels}: label {int(classes.max())}, allowed are 0 to "
            f"{len(CLASSES) - 1}; {remedy}"
        )
    return pixels.unsqueeze(1), classes.long()

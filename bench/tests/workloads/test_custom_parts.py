"""Models and data of the user: names, splits and errors."""

from __future__ import annotations

import gzip
import os
import shutil
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_bench.cli import selection
from apollo_bench.config.execution import Execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.launch import custom_code_checks
from apollo_bench.report import page
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training.loop import train
from apollo_bench.workloads import tasks
from apollo_bench.workloads.image_classification import custom_images, image_folder
from apollo_bench.workloads.language_modeling import custom_text
from apollo_bench.workloads.language_modeling.language_settings import TextFileData
from apollo_bench.workloads.translation import custom_pairs
from bench.tests.helpers import assert_identical, prepared, result
from bench.tests.image_trees import WNIDS, jpeg, photograph, write_tree

MODULE = "custom_models"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the user's folder with a module that is importable from there only."""
    shutil.copy(Path(__file__).with_name(f"{MODULE}.py"), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path
    sys.modules.pop(MODULE, None)


def images(folder: Path) -> Path:
    """Write five images of each of three classes, without splits."""
    for number, name in enumerate(WNIDS * 5):
        path = folder / "my birds" / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(photograph(number, 30, 24)))
    return folder / "my birds"


def text(folder: Path) -> Path:
    path = folder / "novel.txt"
    path.write_text("".join(f"a b c word{i % 7} a b\n" for i in range(100)))
    return path


def pairs(folder: Path) -> Path:
    (folder / "songs").mkdir()
    for language, word in (("fr", "le"), ("it", "il")):
        lines = "".join(f"{word} {word}{i % 9} x{i % 4}\n" for i in range(200))
        (folder / "songs" / f"all.{language}.gz").write_bytes(gzip.compress(lines.encode()))
    return folder / "songs"


MAKE = {"image-folder": images, "text-file": text, "aligned-text": pairs}
SMALL = {
    "image-folder": ["data.size=16", "data.test_resize=18", "train.batch_size=4"],
    "text-file": ["data.bptt_steps=4", "train.batch_size=4", "schedule.updates=6"],
    "aligned-text": [
        *("data.languages=fr,it", "data.subwords=300", "train.batch_size=200"),
        *("schedule.updates=6", "data.beam_size=2", "data.length_constant=3"),
    ],
}
NAMES = {"image-folder": "my-birds", "text-file": "novel", "aligned-text": "songs"}
MODELS = {"image-folder": "Pixels", "text-file": "Recurrent", "aligned-text": "Translator"}


def spec_of(kind: str, data: Path | None, *settings: str, name: str = "sgd") -> RunSpec:
    few = [*SMALL[kind], "schedule.epochs=2"] if kind == "image-folder" else SMALL[kind]
    chosen = selection.select(kind, [*few, *settings], name, None, data=data)
    return chosen.recipe.run(name, 1)


def custom(name: str, *settings: str) -> list[str]:
    table = ", ".join(['family = "custom"', f'factory = "{MODULE}:{name}"', *settings])
    return [f"model={{{table}}}"]


@pytest.mark.parametrize("kind", MAKE)
def test_a_task_on_custom_data_has_their_name_and_no_paper(kind: str, folder: Path) -> None:
    data = MAKE[kind](folder)
    spec = spec_of(kind, data, *custom(MODELS[kind]))
    assert spec.task == NAMES[kind]
    workload = tasks.make(spec, data, workers=0)
    directory = RunDirectory(folder / "out" / "runs" / spec.label)
    directory.prepare(spec, workload.fingerprint, data, ["test"], remarks=workload.remarks)
    train(directory, spec, workload)
    [summary] = page.write([folder / "out"], folder / "out")
    assert summary.paper is None
    html = unescape((folder / "out" / "report.html").read_text())
    assert f"Optimizers on {NAMES[kind]}" in html
    assert f"{MODULE}:{MODELS[kind]}" in html
    for remark in workload.remarks:
        assert remark.split(";")[0] in html


def test_a_resumed_run_keeps_the_state_of_a_custom_model(folder: Path) -> None:
    data = text(folder)
    spec = spec_of("text-file", data, *custom("Recurrent"))
    runs = []
    for name, stop in (("whole", 99), ("resumed", 2)):
        directory, workload = prepared(folder / name, spec, folder=data)
        left = iter([False] * stop)
        while train(directory, spec, workload, lambda left=left: next(left, True)) == "stopped":  # type: ignore[misc]
            left = iter([False] * 99)
        runs.append(result(directory))
    assert len(runs[0]["processes"][0]) > 3  # the hidden state is there too
    assert_identical(runs[0], runs[1])


def test_images_without_splits(folder: Path) -> None:
    found = custom_images.load(images(folder), 0.4)
    remarks = found.remarks
    assert (len(found.train.labels), len(found.test.labels), found.classes) == (9, 6, 3)
    assert found.train.labels.bincount().tolist() == [3, 3, 3]
    found_names = {*names(found.train), *names(found.test)}
    assert len(found_names) == 15
    assert remarks[0] == "9 + 6 images of 3 classes."
    assert "40 % of each class's images" in remarks[1]
    # the fingerprint does not depend on where the folder lies
    moved = shutil.copytree(
        folder / "my birds", folder / "elsewhere" / "x", copy_function=shutil.copy2
    )
    again = custom_images.load(moved, 0.4)
    assert again.fingerprint == found.fingerprint
    assert torch.equal(again.train.labels, found.train.labels)


def test_the_fingerprint_is_of_the_pixels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other pixels under the same name, size and time are other data; known files are not read."""
    root = images(folder)
    before = custom_images.load(root, 0.4).fingerprint
    path = root / WNIDS[1] / "1.jpg"
    content, status = path.read_bytes(), path.stat()
    end = content[-3] ^ 1  # last byte of the compressed pixels
    path.write_bytes(content[:-3] + bytes([end]) + content[-2:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert custom_images.load(root, 0.4).fingerprint != before
    path.write_bytes(content)
    assert custom_images.load(root, 0.4).fingerprint == before
    monkeypatch.setattr(image_folder, "check_image_file", None)
    assert custom_images.load(root, 0.4).fingerprint == before


def names(images: Any) -> list[str]:
    return [Path(images.where(i)).name for i in range(len(images.labels))]


def test_images_with_splits(folder: Path) -> None:
    root = write_tree(folder / "photos")
    found = custom_images.load(root, 0.2)
    remarks = found.remarks
    assert (len(found.train.labels), len(found.test.labels)) == (12, 6)
    assert remarks[1] == "Tested on the images of val."
    shutil.copytree(root / "val", root / "test")
    assert "Those of val were not used." in custom_images.load(root, 0.2).remarks[1]
    shutil.rmtree(root / "test" / WNIDS[0])
    with pytest.raises(ExperimentError, match=r"no such folder, there is .*; both splits need"):
        custom_images.load(root, 0.2)
    shutil.rmtree(root / "test")
    shutil.rmtree(root / "val")
    with pytest.raises(ExperimentError, match="has train, but no test or val or valid"):
        custom_images.load(root, 0.2)
    with pytest.raises(ExperimentError, match="no --data; --data needs a folder with CLASS"):
        custom_images.load(None, 0.2)
    (folder / "few" / "a").mkdir(parents=True)
    shutil.copy(next((root / "train").rglob("*.JPEG")), folder / "few" / "a" / "1.jpg")
    with pytest.raises(ExperimentError, match="few: one class only, a; a classifier needs two or"):
        custom_images.load(folder / "few", 0.2)
    shutil.copytree(folder / "few" / "a", folder / "few" / "b")
    with pytest.raises(ExperimentError, match="1 images, of which 1 would be tested on; add"):
        custom_images.load(folder / "few", 0.2)
    shutil.copytree(folder / "few", folder / "one" / "train" / "x")
    shutil.copytree(folder / "few" / "a", folder / "one" / "test" / "x")
    with pytest.raises(ExperimentError, match="no images"):
        custom_images.load(folder / "one", 0.2)
    shutil.copytree(folder / "few" / "a", folder / "one" / "train" / "x", dirs_exist_ok=True)
    with pytest.raises(ExperimentError, match="train: one class only, x"):
        custom_images.load(folder / "one", 0.2)


def test_one_text_is_cut_in_order(folder: Path) -> None:
    data = TextFileData(kind="text-file", test_share=0.2)
    corpus = custom_text.load(text(folder), data)
    sizes = [len(corpus.train), len(corpus.valid), len(corpus.test)]
    assert sizes == [60 * 7, 20 * 7, 20 * 7]  # six words and an end each
    assert len(corpus.vocabulary) == 3 + 7 + 2
    whole = folder / "line.txt"
    whole.write_text(" ".join(f"w{i % 7}" for i in range(100)))
    corpus = custom_text.load(whole, data)
    assert [len(corpus.train), len(corpus.valid), len(corpus.test)] == [61, 21, 21]
    assert corpus.vocabulary.decode(corpus.test[:3].tolist()) == ["w3", "w4", "w5"]


def test_characters_and_a_file_per_split(folder: Path) -> None:
    root = folder / "texts"
    root.mkdir()
    for name, line in (("train", "abab 日本\n" * 3), ("dev", "ab\n\n"), ("test", "ba\n")):
        (root / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" + line.encode())
    corpus = custom_text.load(root, TextFileData(kind="text-file", unit="character"))
    assert set(corpus.vocabulary.words[2:]) == set("ab 日本")
    assert [len(corpus.train), len(corpus.valid), len(corpus.test)] == [3 * 8, 3, 3]
    assert corpus.empty_lines == 1
    assert corpus.remarks == []
    (root / "val.txt").write_text("as the validation text, but dev comes later\n")
    (root / "notes.md").write_text("")
    (root / "old").mkdir()
    (root / "old" / "test.txt").write_text("")
    corpus = custom_text.load(root, TextFileData(kind="text-file", unit="character"))
    assert corpus.remarks == [
        "Files of texts that are not used: 3 (1 .md, 1 .txt, 1 in folders below). Used are "
        "train.txt, val.txt, test.txt."
    ]
    (root / "val.txt").unlink()
    (root / "test.txt").unlink()
    with pytest.raises(ExperimentError, match=r"test\.txt: no such file; --data needs a text file"):
        custom_text.load(root, TextFileData(kind="text-file"))
    with pytest.raises(ExperimentError, match="nowhere: no such file; --data needs a text file"):
        custom_text.load(folder / "nowhere", TextFileData(kind="text-file"))


def test_indentation_is_part_of_a_text_of_characters(folder: Path) -> None:
    path = folder / "program.txt"
    path.write_bytes(b"if x:\r\n\ty()  \n    \n" * 10)
    corpus = custom_text.load(path, TextFileData(kind="text-file", unit="character"))
    assert set(corpus.vocabulary.words[2:]) == set("if x:\ty()")
    text = "".join(corpus.vocabulary.decode(corpus.train[: 6 + 7 + 5].tolist()))
    end = corpus.vocabulary.words[corpus.vocabulary.end]
    assert text == f"if x:{end}\ty()  {end}    {end}"
    words = custom_text.load(path, TextFileData(kind="text-file"))
    assert set(words.vocabulary.words[2:]) == {"if", "x:", "y()"}


def test_two_aligned_files(folder: Path) -> None:
    root = pairs(folder)
    corpus = custom_pairs.load(root, ("fr", "it"), 0.1)
    assert [corpus.train.size, corpus.valid.size, corpus.test.size] == [160, 20, 20]
    assert (corpus.source_language, corpus.target_language) == ("fr", "it")
    assert (corpus.train.source[0], corpus.train.target[0]) == ("le le0 x0", "il il0 x0")
    assert str(corpus.counts) == "160 of 160 pairs"
    assert corpus.remarks == []
    (root / "all.en").write_text("another language\n")
    assert custom_pairs.load(root, ("fr", "it"), 0.1).remarks == [
        "Files of songs that are not used: 1 (1 .en). Used are all.fr.gz, all.it.gz."
    ]
    back = custom_pairs.load(root, ("it", "fr"), 0.1)
    assert back.train.source == corpus.train.target
    for split in ("train", "val", "test"):
        for language in ("fr", "it"):
            (root / f"{split}.{language}").write_text(f"{split}\n")
    splits = custom_pairs.load(root, ("fr", "it"), 0.1)
    assert splits.valid.source == ["val"]
    assert "not used: 3 (1 .en, 2 .gz). Used are train.fr, train.it, val.fr" in splits.remarks[0]
    (root / "val.it").unlink()
    with pytest.raises(ExperimentError, match=r"no valid\.fr and \.it among all, test, train"):
        custom_pairs.load(root, ("fr", "it"), 0.1)
    with pytest.raises(
        ExperimentError, match=r"no two files of one name that end in \.de and \.en"
    ):
        custom_pairs.load(root, ("de", "en"), 0.1)
    (root / "test.it").write_text("one\ntwo\n")
    (root / "val.it").write_text("val\n")
    with pytest.raises(
        ExperimentError, match=r"has 1 lines, .* has 2: line n of one must translate"
    ):
        custom_pairs.load(root, ("fr", "it"), 0.1)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (
            "image-folder",
            ["task=cifar10"],
            "task is 'cifar10': data.kind 'image-folder' is your own data",
        ),
        ("image-folder", ["task=a/b"], "the name 'a/b' is not allowed; use letters"),
        ("image-folder", custom("Pixels", "depth = 3"), "model.depth is 3: Pixels has no such arg"),
        ("image-folder", custom("Pixels", "classes = 3"), "model.classes is 3: the data set it"),
        (
            "image-folder",
            custom("Nix"),
            "model.factory is 'custom_models:Nix': custom_models has no Nix",
        ),
        ("image-folder", custom("make_nothing"), "must return an nn.Module, got a NoneType"),
        ("image-folder", custom("make_error"), "raised RuntimeError: no such layer"),
        ("image-folder", custom("Pixels", "size = 9"), "a training step raised RuntimeError: mat1"),
        ("image-folder", custom("Words"), "model.vocabulary is missing; Words needs it"),
        ("text-file", custom("Words", "extra = 2"), "must return logits of shape "),
        ("aligned-text", ["data.languages=fr"], "data.languages: is ['fr']: List should have at"),
        ("aligned-text", ["data.languages=fr,fr"], "languages are ['fr', 'fr'], allowed are two"),
        ("aligned-text", ["data.languages=fr,../x"], "allowed are two codes, the endings of"),
        (
            "text-file",
            ["model.family=resnet", "model.depth=8"],
            "needs 'text' and 'lstm' or 'custom'",
        ),
    ],
)
def test_what_cannot_train_is_refused_before_training(
    folder: Path, kind: str, settings: list[str], expected: str
) -> None:
    data = MAKE[kind](folder)
    if "model.family=resnet" in settings:
        settings = ['model={family="resnet", depth=8}']

    def prepare() -> None:
        spec = spec_of(kind, data, *settings)
        workload = tasks.make(spec, data, workers=0)
        custom_code_checks.check([spec], {spec.task: workload}, Execution())

    with pytest.raises(ExperimentError) as caught:
        prepare()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_task_is_named_after_the_data(folder: Path) -> None:
    for name, expected in (
        ("novel.txt.gz", "novel"),
        ("My data (2)", "My-data-2"),
        ("cifar10", "own-cifar10"),
        ("日本", "text-file"),
    ):
        assert selection.name_of_data(folder / name, "text-file") == expected
    assert spec_of("text-file", text(folder), "task=mine").task == "mine"


def test_the_code_of_a_custom_model_is_recorded(folder: Path) -> None:
    spec = spec_of("image-folder", images(folder), *custom("make", "width = 3"))
    [source] = custom_code_checks.code_of(spec)
    assert (source["path"], source["folder"]) == (f"{MODULE}:make", str(folder))
    assert spec.model.model_dump()["width"] == 3

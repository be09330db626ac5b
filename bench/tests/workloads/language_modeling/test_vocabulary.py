"""Words, their ids, and vocabulary files."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.language_modeling import vocabulary
from apollo_bench.workloads.language_modeling.vocabulary import Vocabulary

WORDS = ("</S>", "<S>", "<UNK>", "the", ",", "Zürich")


def test_ids_are_indices() -> None:
    words = Vocabulary(WORDS)
    assert (len(words), words.end, words.unknown) == (6, 0, 2)
    assert words.encode(["Zürich", ",", "the", "zürich"]) == [5, 4, 3, 2, 0]
    assert words.decode([5, 2, 0]) == ["Zürich", "<UNK>", "</S>"]
    assert words.encode([]) == [0]


def test_digest_is_of_words_and_order() -> None:
    digests = {
        Vocabulary(WORDS).digest,
        Vocabulary((*WORDS[:3], ",", "the", "Zürich")).digest,
        Vocabulary(WORDS[:-1]).digest,
        Vocabulary((*WORDS[:3], "the,", "Zürich")).digest,
    }
    assert len(digests) == 4
    assert Vocabulary(list(WORDS)).digest == Vocabulary(WORDS).digest


def test_a_file_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    vocabulary.write(path, Vocabulary(WORDS))
    assert path.read_text("utf-8") == "</S>\n<S>\n<UNK>\nthe\n,\nZürich\n"
    there = vocabulary.read(path)
    assert there.words == WORDS
    assert there.digest == Vocabulary(WORDS).digest


def test_file_with_windows_line_ends_and_no_last_one(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(b"the\r\n</S>\r\n<UNK>")
    assert vocabulary.read(path).words == ("the", "</S>", "<UNK>")


def test_words_are_divided_by_plain_spaces_only(tmp_path: Path) -> None:
    """A no-break space is a letter, in the vocabulary as in the text."""
    path = tmp_path / "words.txt"
    path.write_text("</S>\n<UNK>\n10\xa0000\n", "utf-8")
    assert vocabulary.read(path).words[2] == "10\xa0000"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the\n</S>\n", "words.txt: no <UNK>, which stands for unknown words"),
        (b"the\n<UNK>\n", "words.txt: no </S>, which ends a sentence"),
        (b"", "words.txt: no </S>"),
        (b"</S>\n<UNK>\nthe\na\nthe\n", "words.txt, lines 3 and 5: both 'the'"),
        (b"</S>\n<UNK>\n\nthe\n", "words.txt, line 3: 0 words, allowed is one per line"),
        (b"</S>\n<UNK>\nthe 12\n", "words.txt, line 3: 2 words, allowed is one per line"),
        (b"</S>\n<UNK>\nthe\nZ\xfcrich\n", "words.txt, line 4: not UTF-8"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(ExperimentError, match=message) as caught:
        vocabulary.read(path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"none.txt: cannot be read \(No such file"):
        vocabulary.read(tmp_path / "none.txt")


def test_counted_words_come_by_frequency() -> None:
    counts = {"b": 5, "a": 5, "c": 7, "rare": 1, "</S>": 90, "<S>": 90, "<UNK>": 3}
    words = vocabulary.from_counts(counts, min_count=2)
    assert words.words == ("</S>", "<UNK>", "c", "a", "b")
    backwards = dict(reversed(counts.items()))
    assert vocabulary.from_counts(backwards, min_count=2).digest == words.digest
    assert vocabulary.from_counts(iter(counts.items()), min_count=2).digest == words.digest


def test_limits_of_counted_words() -> None:
    counts = {"a": 3, "b": 2, "c": 1}
    assert vocabulary.from_counts(counts, 1, size=4).words == ("</S>", "<UNK>", "a", "b")
    assert len(vocabulary.from_counts(counts, 1, size=99)) == 5
    with pytest.raises(ExperimentError, match="corpus: no word occurs 4 times"):
        vocabulary.from_counts(counts, 4, origin="corpus")
    with pytest.raises(ValueError, match="size is 2"):
        vocabulary.from_counts(counts, 1, size=2)

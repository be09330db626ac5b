"""The parts of a release agree: versions, promised Pythons and torches, workflows, hooks."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import apollo_qn

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
PROJECTS = [ROOT / "pyproject.toml", ROOT / "bench/pyproject.toml"]
sys.path.insert(0, str(ROOT / "scripts"))

import check_release  # noqa: E402


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def constant(path: str, name: str) -> Any:
    """Return a literal of a module that cannot be imported here."""
    for node in ast.parse(text(path)).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} has no {name}")


def numbers(dotted: str) -> tuple[int, ...]:
    return tuple(map(int, dotted.split(".")))


MATRIX = constant("noxfile.py", "VERSIONS")


def test_one_version() -> None:
    assert set(check_release.versions().values()) == {apollo_qn.__version__}


def released(
    folder: Path,
    source: Path = ROOT,
    address: str = "https://forge.example/apollo-qn",
    date: str = "2030-01-31",
) -> Path:
    """Copy the files that the check of a release reads, with another address and date."""
    names = {*check_release.versions(), *check_release.WITH_ADDRESS}
    contents = {name: (source / name).read_text(encoding="utf-8") for name in names}
    found = re.search(r'^Repository = "(.+)"$', contents["pyproject.toml"], re.MULTILINE)
    assert found is not None
    heading = rf"^(## \[{re.escape(apollo_qn.__version__)}\] - )\S+$"
    for name, content in contents.items():
        content = content.replace(found[1], address)
        content = re.sub(heading, rf"\g<1>{date}", content, flags=re.M)
        content = re.sub("^(# )?date-released: .*$", f"date-released: {date}", content, flags=re.M)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_the_check_serves_before_and_after_a_release(tmp_path: Path) -> None:
    tag = f"v{apollo_qn.__version__}"
    before = released(tmp_path / "before", address=check_release.PLACEHOLDER, date="unreleased")
    problems = check_release.problems(tag, before)
    assert len(problems) == len(check_release.WITH_ADDRESS) + 2  # two dates
    first = released(tmp_path / "first", before)
    assert check_release.problems(tag, first) == []
    again = released(tmp_path / "again", first, "https://other.example/apollo-qn", "2031-02-28")
    assert check_release.problems(tag, again) == []
    for name in check_release.WITH_ADDRESS:
        content = (again / name).read_text(encoding="utf-8")
        assert "https://other.example" in content
        assert "https://forge.example" not in content


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("CHANGELOG.md", "- 2030-01-31", "- unreleased", "CHANGELOG.md has no date"),
        ("CITATION.cff", "2030-01-31", "2030-02-01", "the dates differ: 2030-01-31 and 2030-02-01"),
        ("CITATION.cff", "\nversion: ", "\nversion: 9", "CITATION.cff names 9"),
        ("src/apollo_qn/__init__.py", '__version__ = "', '__version__ = "9', "init__.py names 9"),
        ("bench/pyproject.toml", '"apollo-qn>=', '"apollo-qn>=9', "bench/pyproject.toml names 9"),
        ("CHANGELOG.md", "...HEAD", "9...HEAD", "has no address for [Unreleased] that names v"),
        ("CHANGELOG.md", "/releases/tag/v", "/releases/tag/v9", "has no address for ["),
        ("pyproject.toml", "https://forge.example", "https://example.org", "of the repository's"),
    ],
)
def test_a_release_is_checked(name: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    root = released(tmp_path)
    tag = f"v{apollo_qn.__version__}"
    assert check_release.problems(tag, root) == []
    content = (root / name).read_text(encoding="utf-8")
    assert old in content
    (root / name).write_text(content.replace(old, new, 1), encoding="utf-8")
    (problem,) = check_release.problems(tag, root)
    assert message.replace("of the", "instead of the") in problem


def test_a_tag_has_a_form() -> None:
    assert "the tag '0.2.0' is not of the form v1.2.3" in check_release.problems("0.2.0")


def test_the_matrix_holds_what_is_promised() -> None:
    pythons, torches = zip(*MATRIX, strict=True)
    for project in PROJECTS:
        settings = project.read_text(encoding="utf-8")
        listed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', settings)
        assert listed == sorted(set(pythons), key=numbers)
        assert f'requires-python = ">={listed[0]}"' in settings
        assert f'"torch>={min(torches, key=numbers)}"' in settings
    assert constant("setup.py", "OLDEST") in map(numbers, torches)


def test_the_workflows_run_the_matrix() -> None:
    rows = [{"python": python, "torch": torch} for python, torch in MATRIX]
    jobs = load(GITHUB / "workflows/ci.yml")["jobs"]
    assert jobs["matrix"]["strategy"]["matrix"]["include"] == rows
    with_kernel = [row for row in rows if numbers(row["torch"]) >= constant("setup.py", "OLDEST")]
    jobs = load(GITHUB / "workflows/release.yml")["jobs"]
    assert jobs["torch"]["strategy"]["matrix"]["include"] == with_kernel


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_the_workflows_call_is_there(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] > 0, name
        needed = job.get("needs", [])
        needed = [needed] if isinstance(needed, str) else needed
        assert set(needed) <= set(workflow["jobs"])
        for step in job["steps"]:
            command = step.get("run", "")
            assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= targets
            for script in re.findall(r"\b(?:scripts|requirements)/[\w.]+", command):
                assert (ROOT / script).is_file()
            assert "${{ github" not in command, "an event's text must not become code"


def test_the_hooks_have_the_pinned_versions() -> None:
    pins = set(text("requirements/dev.txt").splitlines())
    hooks = [
        hook for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    ]
    assert {hook["id"] for hook in hooks} >= {"ruff-format", "ruff-check", "mypy"}
    for hook in hooks:
        if hook["language"] == "system":  # of the environment with the pinned versions
            assert hook["entry"].startswith(".venv/bin/")
        else:
            assert hook["additional_dependencies"]
            assert set(hook["additional_dependencies"]) <= pins


def test_issue_forms_ask_for_existing_things() -> None:
    forms = {path.stem: load(path) for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml")}
    assert set(forms) == {"bug", "config", "feature", "results"}
    for name in ("bug", "feature", "results"):
        ids = [part["id"] for part in forms[name]["body"] if "id" in part]
        assert len(set(ids)) == len(ids)
    assert "apollo-bench archive" in str(forms["results"])


def test_wheels_are_built_with_the_oldest_torch_that_has_the_kernel() -> None:
    oldest = ".".join(map(str, constant("setup.py", "OLDEST")))
    assert f"'torch=={oldest}.*'" in text("pyproject.toml").partition("[tool.cibuildwheel]")[2]


def test_the_check_looks_wherever_a_placeholder_stands() -> None:
    names = ["pyproject.toml", "bench/pyproject.toml", "CITATION.cff", "README.md", "mkdocs.yml"]
    names += ["CHANGELOG.md", "bench/README.md"]
    found = {name for name in names if check_release.PLACEHOLDER in text(name)}
    assert found <= set(check_release.WITH_ADDRESS)

"""The house's rules: imports go down only, nobody imports a script, rooms stay readable."""

import ast
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {"prepare_data", "train", "evaluate", "generate", "upload_to_hf"}
ROOT_FILES = {
    *(f"{name}.py" for name in ("config", "model", *SCRIPTS)),
    "README.md", "LICENSE", "Makefile", "pyproject.toml", "requirements.txt",
    "requirements-dev.txt", ".gitignore",
}  # fmt: skip
ROOT_FOLDERS = {"storygpt", "space", "experiments", "docs", "tests", "data", "checkpoints", ".ci"}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in listed.stdout.splitlines()]


def modules() -> list[Path]:
    return [p for p in tracked() if p.suffix == ".py" and p.parts[0] != "tests"]


def imported(path: Path) -> set[str]:
    """Whole names of what a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor(path: Path) -> int:
    """0 for config, then model, storygpt/, and the scripts and experiments above all."""
    if path.parent == Path():
        return {"config": 0, "model": 1}.get(path.stem, 3)
    return 2 if path.parts[0] == "storygpt" else 3


def test_imports_go_down_only_and_nobody_imports_a_script():
    for path in modules():
        for name in imported(path):
            first = name.split(".")[0]
            assert first not in SCRIPTS | {"experiments", "space", "tests"}, f"{path}: {name}"
            above = {"config": 0, "model": 1, "storygpt": 2}.get(first, -1)
            assert above < floor(path) or (first == "storygpt" == path.parts[0]), f"{path}: {name}"


def test_published_files_and_the_token_files_import_little():
    standard = {"__future__", "collections", "dataclasses", "math", "typing"}
    allowed = {
        "config.py": standard,
        "model.py": standard | {"torch", "config"},
        "storygpt/token_files.py": standard
        | {"config", "functools", "hashlib", "json", "numpy", "os", "pathlib", "storygpt"},
    }
    for name, these in allowed.items():
        assert {n.split(".")[0] for n in imported(Path(name))} <= these, name


def test_rooms_of_storygpt_have_no_circle():
    rooms = {".".join(p.with_suffix("").parts): p for p in modules() if p.parts[0] == "storygpt"}
    edges = {
        room: {
            other for other in rooms if any(f"{n}.".startswith(f"{other}.") for n in imported(p))
        }
        for room, p in rooms.items()
    }
    while edges:
        free = {room for room, needs in edges.items() if not needs & edges.keys()}
        assert free, f"a circle among {sorted(edges)}"
        edges = {room: needs for room, needs in edges.items() if room not in free}


def test_the_root_holds_the_reference_layout_and_no_more():
    assert {str(p) for p in tracked() if p.parent == Path()} <= ROOT_FILES
    assert {p.parts[0] for p in tracked() if p.parent != Path()} <= ROOT_FOLDERS


def test_no_function_is_longer_than_a_screen():
    for path in modules():
        if path.parts[0] == "experiments" or path.stem == "builtin_stories":
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"

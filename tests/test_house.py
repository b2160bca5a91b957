"""The layout: who may import whom, and that the product stands without the laboratory."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mesa_gguf
from conftest import ROOT

PACKAGE = Path(mesa_gguf.__file__).parent

# from the ground up; a room may use those below it, and its own
FLOORS = (
    ("errors", "_core", "paths"),
    ("_llama_cpp", "machine", "crew"),
    ("config", "state"),
    ("model",),
    ("rpc",),
    ("text",),
    ("grammar", "vocabulary"),
    ("sampling", "embedding"),
    ("completion", "chat"),
    ("llama",),
    ("loaders",),
    ("library",),
    ("reading",),
    ("lab", "server"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, *, at_once: bool = False) -> set[str]:
    """The modules of this package that a module imports.

    Args:
        at_once: without what it imports in functions, and for types alone.
    """
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = list(ast.walk(tree))
    if at_once:
        nodes = [
            node for top in tree.body if not isinstance(top, (ast.If, ast.FunctionDef)) for node in walk_outside(top)
        ]
    found = set()
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            found.add(whole if whole in MODULES or whole == "_core" else ".".join(base) or "__init__")
    return found


def walk_outside(node: ast.AST) -> list[ast.AST]:
    """A node and those in it, functions left out."""
    inside = [n for child in ast.iter_child_nodes(node) for n in walk_outside(child)]
    return [] if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) else [node, *inside]


def test_every_room_is_on_a_floor() -> None:
    rooms = {name.split(".")[0] for name in MODULES} - {"__init__"}
    assert rooms <= set(FLOOR)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_nothing_imports_upwards(name: str) -> None:
    room = name.split(".")[0]
    for other in imports(name) - {"__init__"}:
        above = other.split(".")[0]
        assert FLOOR[above] < FLOOR[room] or above == room, f"{name} imports {other}"


def test_nothing_imports_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name in done:
            return
        for other in imports(name, at_once=True):
            if other in MODULES and other != "__init__":
                visit(other, (*way, name))
        done.add(name)

    for name in MODULES:
        visit(name, ())


def in_another_place(folder: Path, code: str, *, without: tuple[str, ...] = ()) -> str:
    """What a program prints that sees a copy of this package without its laboratory, and without some packages."""
    copy = folder / "mesa_gguf"
    if not copy.exists():
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "lab"))
        extension = Path(sys.modules["mesa_gguf._core"].__file__ or "")
        if not (copy / extension.name).exists():
            shutil.copy(extension, copy)
            os.symlink(extension.parent / "lib", copy / "lib")
    block = f"import sys; sys.path.insert(0, {str(folder)!r}); sys.modules.update(dict.fromkeys({without!r}))\n"
    # note: an editable install finds the original by a hook that comes first; -S would be without the other packages too
    block += "sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("matplotlib", "huggingface_hub", "gguf", "fastapi", "uvicorn")


def test_asking_needs_no_laboratory(tmp_path: Path) -> None:
    (tmp_path / "document.txt").write_text("The door code of Mara Lind is 48213. It rained on Monday until noon.\n" * 3)
    code = (
        "from mesa_gguf.cli import main\nimport mesa_gguf\n"
        "code = main(['ask', '-f', 'document.txt', 'What is the door code of Mara Lind?', '--threads', '1'])\n"
        "print(code, 'mesa_gguf.lab' in sys.modules, mesa_gguf.__file__)"
    )
    answer, rest = in_another_place(tmp_path, code, without=HEAVY).splitlines()
    assert answer == "The door code of Mara Lind is 48213."
    assert rest == f"0 False {tmp_path / 'mesa_gguf' / '__init__.py'}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--tokens", "9000", "--plot", "plan.png"], "pip install 'mesa-gguf[lab]'"),
        (["serve"], "pip install 'mesa-gguf[server]'"),
        (["inspect", "hf:owner/repo/file.gguf"], "pip install 'mesa-gguf[hub]'"),
        (["bench", "--shape", "tiny", "--method", "mesa"], "pip install 'mesa-gguf[lab]'"),
    ],
)
def test_what_is_missing_is_told_by_its_pip_command(tmp_path: Path, arguments: list[str], said: str) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"
    code += f"from mesa_gguf.cli import main; sys.exit(main({arguments!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, check=False, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_help_is_there_at_once() -> None:
    """What --help imports is what makes it slow; a timed test would say less on a busy machine."""
    slow = (*HEAVY, "rich.progress", "mesa_gguf.lab")
    code = f"import sys, mesa_gguf.cli; print([name for name in {slow!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests", check=True)
    assert done.stdout.strip() == "[]"

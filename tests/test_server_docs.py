"""The commands and programs of docs/SERVER.md, run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT
from server_process import CODES, Server, facts

PAGE = (ROOT / "docs" / "SERVER.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8080"
BLOCKS = re.findall(r"^```(sh|python|yaml)\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("docs"), "--n-ctx", "2048") as running:
        yield running


@pytest.mark.parametrize("kinds", [("sh",), pytest.param(("sh", "python", "yaml"), marks=pytest.mark.slow)])
def test_every_block_says_what_it_says(server: Server, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """In the order of the page: each goes on with what those before it made. The programs that are imported take their time."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not there")
    (tmp_path / "report.txt").write_text(facts(), encoding="utf-8")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "LLM_USER_PATH": str(tmp_path)}
    ran = []
    for kind, text in BLOCKS:
        code = text.replace(ADDRESS, server.url)
        if kind not in kinds or ("yaml" not in kinds and "llm -m" in code):
            continue
        if kind == "yaml":
            (tmp_path / "extra-openai-models.yaml").write_text(code)
            continue
        command = ["sh", "-ec", code.replace("curl ", "curl -fsS ")] if kind == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip()
        if "Mara Lind" in code:
            assert str(CODES["Mara Lind"]) in done.stdout, done.stdout
        ran.append(kind)
    assert sorted(ran) == (["python", "python", "sh", "sh"] if "python" in kinds else ["sh"])


def test_every_route_is_described(server: Server) -> None:
    described = server.json("GET", "/openapi.json")["paths"]
    names = {re.sub(r"\{\w+(:path)?\}", "{}", path) for path in described}
    for name in ("/v1/files/{}/events", "/v1/files/{}/text", "/v1/vector_stores/{}/files/{}", "/page/conversations/{}"):
        assert name in names
    for path in names - {"/openapi.json"}:
        parts = [part.replace("{}", "") for part in path.split("/") if part not in ("", "{}")]
        assert all(part in PAGE for part in parts), path

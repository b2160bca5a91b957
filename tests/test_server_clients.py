"""Programs that speak OpenAI's API, unchanged, and requests that nobody would make."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr
from schemathesis.checks import not_a_server_error

from server_process import CODES, Server, facts


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("clients"), "--n-ctx", "2048") as running:
        yield running


def test_langchain(server: Server) -> None:
    chat: Any = ChatOpenAI(base_url=f"{server.url}/v1", api_key=SecretStr("none"), model="mesa", temperature=0, max_retries=0, max_completion_tokens=8)  # fmt: skip
    whole = chat.invoke("Hello")
    assert whole.content and whole.usage_metadata["output_tokens"] > 0
    assert "".join(piece.content for piece in chat.stream("Hello")) == whole.content
    embeddings = OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key=SecretStr("none"), model="mesa", check_embedding_ctx_length=False
    )
    one, two = embeddings.embed_documents(["one", "two"])
    assert len(one) == len(two) and one != two


def test_langchain_about_a_document(server: Server) -> None:
    file_id = server.wait_for(server.upload(facts().encode(), "codes.txt")["id"])["id"]
    chat: Any = ChatOpenAI(
        base_url=f"{server.url}/v1", api_key=SecretStr("none"), model="mesa", extra_body={"documents": [file_id]}
    )
    assert str(CODES["Eva Stone"]) in chat.invoke("What is the door code of Eva Stone?").content


class Door(BaseModel):
    """A door."""

    code: Literal["48213"]


def test_langchain_has_forms_and_tools(server: Server) -> None:
    """Also about a document, and in streams, whose chunks it adds up."""
    file_id = server.wait_for(server.upload(facts().encode(), "codes.txt")["id"])["id"]
    for extra in ({}, {"documents": [file_id]}):
        chat: Any = ChatOpenAI(
            base_url=f"{server.url}/v1", api_key=SecretStr("none"), model="mesa", temperature=0, max_retries=0,
            max_completion_tokens=48, extra_body=extra,
        )  # fmt: skip
        formed = chat.with_structured_output(Door, method="json_schema")
        assert formed.invoke("What is the door code of Mara Lind?") == Door(code="48213")
        calling = chat.bind_tools([Door], tool_choice="Door")
        (call,) = calling.invoke("Open the door of Mara Lind.").tool_calls
        assert call["name"] == "Door" and call["args"] == {"code": "48213"}
        added = sum(calling.stream("Open the door of Mara Lind."), start=AIMessageChunk(content=""))
        (call,) = added.tool_calls
        assert call["name"] == "Door" and call["args"] == {"code": "48213"}


@pytest.mark.parametrize("more", [[], pytest.param(["--no-stream"], marks=pytest.mark.slow)])
def test_llm(server: Server, tmp_path: Path, more: list[str]) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mesa\n  model_name: mesa\n  api_base: {server.url}/v1\n  api_key_name: none\n"
    )
    command = [sys.executable, "-m", "llm", "-m", "mesa", "Hello", "-o", "max_tokens", "8", "-o", "temperature", "0"]
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    done = subprocess.run([*command, "--key", "x", *more], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.slow
def test_no_request_makes_the_server_fail(server: Server) -> None:
    """Requests of every kind that the description allows, and some that it does not."""
    bounds = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    found = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [operation.ok() for operation in found.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:
        for mode in modes:
            try:
                bounds(given(operation.as_strategy(generation_mode=mode))(send))()
            except Unsatisfiable:  # nothing of this request can be wrong
                assert mode is schemathesis.GenerationMode.NEGATIVE


def send(case: Any) -> None:
    if isinstance(case.body, dict):  # what takes long is another test's
        for name, most in (("max_tokens", 4), ("max_completion_tokens", 4), ("n", 2)):
            if isinstance(case.body.get(name), int):
                case.body[name] = min(case.body[name], most)
        if case.operation.path == "/v1/chat/completions":
            case.body.setdefault("max_tokens", 4)
    response = case.call(timeout=60)
    case.validate_response(response, checks=(not_a_server_error,))
    assert response.status_code < 400 or response.json()["error"]["message"]

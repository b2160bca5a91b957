"""What Open WebUI (0.12.4) sends to a connection of the kind OpenAI, as it was recorded: docs/SERVER.md has its settings."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesa_gguf.server.intake import PASTED_CHARS, Sources, split_pasted, split_sources
from server_process import CODES, Server, facts

KEY = "sk-of-open-webui"
HEADERS = {"Authorization": f"Bearer {KEY}", "User-Agent": "Python/3.11 aiohttp/3.14.5"}
GUIDELINES = """### Task:
Respond to the user query using the provided context, incorporating inline citations in the format [id] **only when the <source> tag includes an explicit id attribute** (e.g., <source id="1">).

### Guidelines:
- If you don't know the answer, clearly state that."""
TITLE = """### Task:
Generate a concise, 3-5 word title with an emoji summarizing the chat history.
### Output:
JSON format: { "title": "your concise title here" }
### Chat History:
<chat_history>
USER: {question}
ASSISTANT: {answer}
</chat_history>"""


def tool(name: str) -> dict[str, Any]:
    about = {
        "name": name,
        "description": "Get the current Unix timestamp in seconds.",
        "parameters": {"properties": {}, "type": "object"},
    }
    return {"type": "function", "function": about}


TOOLS = [tool(f"view_{n}") for n in range(28)]
"""As many as come with each request, of about this length."""


def in_context(sources: dict[str, str], question: str) -> str:
    parts = [
        f'<source id="{n}" name="{name}" resource-type="file" resource-id="6a81b3f6">{text}</source>'
        for n, (name, text) in enumerate(sources.items(), 1)
    ]
    return f"{GUIDELINES}\n\n<context>\n{chr(10).join(parts)}\n</context>\n\n{question}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("webui")
    with Server(folder, "--n-ctx", "8192", "--max-tokens", "200", env={"MESA_API_KEY": KEY}) as running:
        yield running


def request_of(content: str, **more: Any) -> dict[str, Any]:
    return {"stream": True, "model": "mesa", "messages": [{"role": "user", "content": content}],
            "stream_options": {"include_usage": True}, "max_tokens": 24, "temperature": 0, "tools": TOOLS, **more}  # fmt: skip


def answered(server: Server, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of a stream, and its last chunk."""
    asked = Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json", **HEADERS}
    )
    chunks = []
    with urlopen(asked, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                chunks.append(json.loads(line[6:]))
    assert not any("error" in chunk for chunk in chunks), chunks
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    return text, chunks[-1]


def test_a_connection_is_verified(server: Server) -> None:
    found = server.json("GET", "/v1/models", headers=HEADERS)
    assert [model["object"] for model in found["data"]] == ["model"]
    assert server.error("GET", "/v1/models", headers={"Authorization": "Bearer sk-wrong"})[0] == 401


def test_a_chat_with_its_tools_is_answered_in_words(server: Server) -> None:
    """All of its tools come with each request, and fields that OpenAI does not know may."""
    more = {"chat_id": "c", "session_id": "s", "metadata": {"a": 1}, "params": {}, "features": {"web_search": False}}
    text, last = answered(server, request_of("Hello", **more))
    assert text and last["usage"]["completion_tokens"] > 0


def test_a_file_in_full_context_is_read_once(server: Server) -> None:
    sources = {"codes &amp; keys.txt": facts(170).replace("ferry", "barge")}
    told = {}
    for name in ("Ida Frost", "Mara Lind"):
        text, last = answered(server, request_of(in_context(sources, f"What is the door code of {name}?")))
        assert str(CODES[name]) in text
        told[name] = last["usage"]
    assert told["Ida Frost"]["prompt_tokens_details"]["cached_tokens"] < 1000 < told["Ida Frost"]["prompt_tokens"]
    rest = told["Mara Lind"]["prompt_tokens"] - told["Mara Lind"]["prompt_tokens_details"]["cached_tokens"]
    # the question and its guidelines, but neither the document nor tools that are not called
    assert rest < 400


def test_citations_name_the_files_in_the_context(server: Server) -> None:
    sources = {"codes &amp; keys.txt": facts(100).replace("ferry", "raft"),
               "weather.txt": "\n".join(f"On day {n} the wind came from the north." for n in range(120))}  # fmt: skip
    body = {
        **request_of(in_context(sources, "What is the door code of Tom Hale?")),
        "stream": False,
        "stream_options": None,
    }
    found = server.json("POST", "/v1/chat/completions", body, headers=HEADERS)
    assert found["choices"][0]["message"]["annotations"][0]["filename"] == "codes & keys.txt"
    assert found["mesa"]["read"]["documents"] == ["codes & keys.txt", "weather.txt"]


def test_titles_are_made_while_a_chat_is_answered(server: Server) -> None:
    """Its requests in the background, long ones too, are no documents."""
    title = TITLE.replace("{question}", "What is it?").replace("{answer}", "It is the ferry. " * 600)
    assert len(title) > PASTED_CHARS
    body = {**request_of(title), "stream": False, "stream_options": None, "tools": None}
    found: list[Any] = []
    asking = threading.Thread(
        target=lambda: found.append(server.json("POST", "/v1/chat/completions", body, headers=HEADERS))
    )
    asking.start()
    text, _ = answered(server, request_of("Hello", max_tokens=60))
    asking.join(60)
    assert text and "mesa" not in found[0] and found[0]["choices"][0]["message"]["annotations"] == []


def test_sources_may_stand_in_the_system_message(server: Server) -> None:
    """With RAG_SYSTEM_CONTEXT; and as AnythingLLM has them."""
    text = facts(170).replace("ferry", "yacht")
    question = {"role": "user", "content": "What is the door code of Ben Moor?"}
    tagged = in_context({"codes.txt": text}, "")
    bracketed = f"You are a helpful assistant.\nContext:\n[CONTEXT 0]:\n{text.strip()}\n[END CONTEXT 0]\n\n"
    computed = []
    for system in (tagged, bracketed):
        body = {"messages": [{"role": "system", "content": system}, question], "max_tokens": 24}
        found = server.json("POST", "/v1/chat/completions", body, headers=HEADERS)
        assert str(CODES["Ben Moor"]) in found["choices"][0]["message"]["content"]
        computed.append(found["mesa"]["read"]["tokens_computed"])
    assert computed[0] > 1000 and computed[1] == 0


def test_an_answer_ends_where_it_names_no_limit(server: Server) -> None:
    """It names none unless it is told to, and a small model may go on and on."""
    body = request_of("Hello", logit_bias={str(token): -100 for token in range(3)})
    del body["max_tokens"]
    assert answered(server, body)[1]["usage"]["completion_tokens"] == 200
    assert answered(server, {**body, "max_tokens": 210})[1]["usage"]["completion_tokens"] == 210


def test_the_stop_button_closes_the_connection(server: Server) -> None:
    body = request_of("Hello", max_tokens=8000, temperature=2.0)
    asked = Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json", **HEADERS}
    )
    with urlopen(asked, timeout=60) as answer:
        answer.readline()
    begin = time.monotonic()
    server.json("POST", "/v1/completions", {"prompt": "The", "max_tokens": 1}, headers=HEADERS)
    assert time.monotonic() - begin < 5


# Its sources.


def test_contexts_in_brackets_are_documents() -> None:
    one, two = "a" * PASTED_CHARS, "[CONTEXT 7]:\nwithin\n[END CONTEXT 7]"
    text = f"Be brief.\nContext:\n[CONTEXT 0]:\n{one}\n[END CONTEXT 0]\n\n[CONTEXT 1]:\n{two}\n[END CONTEXT 1]\n\nThat is all."
    found = split_sources(text)
    assert found == Sources([(None, one), (None, two)], "Be brief.", "That is all.")
    assert split_sources(text.replace("[END", "[")) is None


def test_sources_are_documents_and_the_guidelines_say_how_to_answer() -> None:
    one, two = "a" * PASTED_CHARS, "The code is 1.\n\nWhat is <b>?"
    found = split_sources(in_context({"a.txt": one, "../b&quot;.txt": two}, "What is it?\n\nSay."))
    assert found is not None and found.before == GUIDELINES and found.behind == "What is it?\n\nSay."
    assert found.documents == [("a.txt", one), ('b".txt', two)]
    assert split_sources(in_context({"a.txt": "short"}, "What is it?")) is None
    found = split_sources(in_context({"a.txt": one}, ""))
    assert found is not None and found.behind == ""
    assert split_sources(one) is None
    assert split_sources(in_context({f"{n}.txt": one for n in range(33)}, "Why?")) is None  # as many are kept in all
    assert split_pasted(f"<chat_history>\n{one}\n\nWhat?\n</chat_history>")[0] == ""


@given(
    st.lists(
        st.text('ab<>/sourcename= \n"', max_size=40)
        | st.sampled_from(
            ["<source>", "</source>", "<context>", '<source name="', "\n", "\n[CONTEXT 1]:\n", "\n[END CONTEXT 1]"]
        )
    ),
    st.booleans(),
)
def test_any_text_with_tags_is_split_without_loss(parts: list[str], whole: bool) -> None:
    text = "".join(parts)
    text = in_context({"a.txt": text + "x" * PASTED_CHARS}, "Why?") if whole else text + "\n" + "y" * PASTED_CHARS
    found = split_sources(text)
    if found is None:
        return
    assert all(document for _, document in found.documents)
    kept = "".join([found.before, *(document for _, document in found.documents), found.behind])
    assert sum(map(kept.count, "xy")) >= PASTED_CHARS
    if whole:
        assert found.behind == "Why?" and found.before.startswith("### Task:")


@pytest.mark.parametrize(
    "part",
    [
        "\n",
        " ",
        "<",
        "<source ",
        "<source>",
        "</source>\n",
        "</source> <source>",
        "<context>",
        "\n[CONTEXT 1]:\n",
        "[END CONTEXT 1]\n",
        '<source name="',
    ],
)
def test_no_text_takes_long(part: str) -> None:
    text = f"\n<source>{part * (2_000_000 // len(part))}"
    begin = time.monotonic()
    for given_text in (text, f"{text}</source>"):
        split_sources(given_text)
    assert time.monotonic() - begin < 10

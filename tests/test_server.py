"""The server's API: OpenAI's own client, streams, documents, collections, and errors."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from server_process import CODES, Server, facts, form

ADD: Any = {"type": "function", "function": {"name": "add", "description": "Adds numbers.", "parameters": {
    "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}}}  # fmt: skip
PROMPT = "The door code of Mara Lind is 48213.\n\nQuestion: What is the door code of Mara Lind?\nAnswer:"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("served"), "--n-ctx", "8192") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    """A file that was uploaded and is read."""
    return server.wait_for(server.upload(facts().encode(), "codes.txt")["id"])


def about(file_id: str, question: str) -> Any:
    return [
        {
            "role": "user",
            "content": [{"type": "file", "file": {"file_id": file_id}}, {"type": "text", "text": question}],
        }
    ]


# Without documents.


def test_the_model_is_listed(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "mesa-reader-q8_0" and client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_completion_is_what_the_model_says(client: OpenAI) -> None:
    answer = client.completions.create(model="mesa", prompt=PROMPT, max_tokens=16, temperature=0, stop="\n")
    assert "48213" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens > 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same(client: OpenAI) -> None:
    options: dict[str, Any] = dict(model="mesa", prompt=PROMPT, max_tokens=16, temperature=0, stop="\n")
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    usage = chunks[-1].usage
    assert usage is not None and whole.usage is not None and chunks[-1].choices == []
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    # the prompt is in the context still: all of it but the token that is read for its logits
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_prompts_and_choices_are_numbered(client: OpenAI) -> None:
    answer = client.completions.create(model="mesa", prompt=["One", "Two"], n=2, max_tokens=2, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text


def test_a_seed_gives_the_same_again(client: OpenAI) -> None:
    def say(seed: int) -> str:
        return (
            client.completions.create(model="mesa", prompt="The", max_tokens=12, temperature=2, seed=seed)
            .choices[0]
            .text
        )

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(4)}) > 1


def test_chat_in_one_piece_and_in_many(client: OpenAI) -> None:
    options: dict[str, Any] = dict(
        model="mesa", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0
    )
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_log_probabilities_of_an_answer(client: OpenAI) -> None:
    options: dict[str, Any] = dict(
        model="mesa", messages=[{"role": "user", "content": "Hello"}], max_tokens=4, temperature=0
    )
    found = client.chat.completions.create(**options, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert found is not None and found.content is not None and len(found.content) == 4
    for token in found.content:
        assert (
            token.logprob <= 0 and max(top.logprob for top in token.top_logprobs) == token.logprob
        )  # the likeliest one


def test_json_keeps_to_its_schema(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [3, 4]}}, "required": ["n"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="mesa", messages=[{"role": "user", "content": "Hello"}], max_tokens=64, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "number", "schema": schema}},
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content or "")["n"] in (3, 4)


def test_a_tool_is_called(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="mesa", messages=[{"role": "user", "content": "Hello"}], max_tokens=64, temperature=0, tools=[ADD],
        tool_choice={"type": "function", "function": {"name": "add"}},
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls or ()
    assert (
        call.type == "function" and call.function.name == "add" and json.loads(call.function.arguments)["a"] in (1, 2)
    )


def test_a_tool_is_called_in_a_stream(client: OpenAI) -> None:
    """Clients add up what the chunks say: an id and a name come once."""
    options: dict[str, Any] = dict(
        model="mesa", messages=[{"role": "user", "content": "Hello"}], max_tokens=64, temperature=0, tools=[ADD],
        tool_choice={"type": "function", "function": {"name": "add"}},
    )  # fmt: skip
    (whole,) = client.chat.completions.create(**options).choices[0].message.tool_calls or ()
    with client.chat.completions.stream(**options) as stream:
        (choice,) = stream.get_final_completion().choices
    (call,) = choice.message.tool_calls or ()
    assert call.type == whole.type == "function" and call.function.name == "add"
    assert whole.type == "function" and call.function.arguments == whole.function.arguments
    assert choice.finish_reason == "tool_calls" and call.id.count("call_") == 1


def test_one_of_several_tools_is_called(client: OpenAI, document: dict[str, Any]) -> None:
    """With documents and without, in one piece and in a stream: the same call."""
    text = {"type": "object", "properties": {"text": {"$ref": "#/$defs/Word"}}, "required": ["text"],
            "$defs": {"Word": {"enum": ["a } b", "c"]}}}  # fmt: skip
    number = {"type": "object", "properties": {"n": {"$ref": "#/$defs/Word"}, "of": {"type": "object", "properties": {}}},
              "required": ["n", "of"], "$defs": {"Word": {"enum": [7, 8]}}}  # fmt: skip
    tools: Any = [{"type": "function", "function": {"name": name, "parameters": schema}}
                  for name, schema in (("say", text), ("count.all", number), ("stop", {"type": "object", "properties": {}}))]  # fmt: skip
    known = {"say": {"text"}, "count.all": {"n", "of"}, "stop": set()}
    called = set()
    for messages in ([{"role": "user", "content": "Hello"}], about(document["id"], "What is the code?")):
        for seed in range(5):
            options: dict[str, Any] = dict(
                model="mesa", messages=messages, tools=tools, tool_choice="required", temperature=2, seed=seed, max_tokens=64,
            )  # fmt: skip
            choice = client.chat.completions.create(**options).choices[0]
            (call,) = choice.message.tool_calls or ()
            assert choice.finish_reason == "tool_calls" and choice.message.content is None
            assert set(json.loads(call.function.arguments)) == known[call.function.name]
            with client.chat.completions.stream(**options) as stream:
                (streamed,) = stream.get_final_completion().choices
            (again,) = streamed.message.tool_calls or ()
            assert (again.function.name, again.function.arguments) == (call.function.name, call.function.arguments)
            assert streamed.finish_reason == "tool_calls" and again.id.count("call_") == 1
            called.add(call.function.name)
            cut = client.chat.completions.create(**{**options, "max_tokens": 1}).choices[0]
            assert cut.finish_reason == "length" and not cut.message.tool_calls
        stopped = client.chat.completions.create(**options, stop=["name"]).choices[0]
        assert stopped.finish_reason == "stop" and not stopped.message.tool_calls
        last = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stop=["name"], stream=True)][-1]
        assert last.finish_reason == "stop"
    assert len(called) > 1


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [({"messages": [{"role": "user", "content": "x"}], "read": 0}, "read", ("'auto'", "greater than or equal to 1")),
     ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", ("string", "list")),
     ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", ("required",)),
     ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": 3}}]}]}, "messages.0.content.0.file.file_id", ("string",)),
     ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0", ("image_url", "'text', 'file'")),
     ({"messages": [{"role": "user", "content": "x"}], "stop": 3}, "stop", ("string", "list")),
     ({"messages": [{"role": "user", "content": "x"}], "tool_choice": "some"}, "tool_choice", ("'required'",)),
     ({}, "messages", ("required",))],
)  # fmt: skip
def test_a_wrong_field_is_told_by_its_name(server: Server, body: Any, param: str, said: tuple[str, ...]) -> None:
    status, error = server.error("POST", "/v1/chat/completions", body)
    assert status == 400 and error["param"] == param
    assert error["message"].startswith(f"{error['param']}: ") and all(word in error["message"] for word in said)


def test_what_is_asked_at_the_wrong_place_is_led_to_the_right_one(server: Server) -> None:
    status, headers, data = server.ask("GET", "/v1/chat/completions")
    assert status == 405 and headers["allow"] == "POST" and "takes POST" in json.loads(data)["error"]["message"]
    status, headers, data = server.ask("PATCH", "/v1/files/x")
    assert status == 405 and "DELETE and GET" in json.loads(data)["error"]["message"]
    # a client whose address lacks it
    status, error = server.error("POST", "/chat/completions", {"messages": []})
    assert status == 404 and "under /v1" in error["message"]
    assert server.error("GET", "/v1/nothing")[1]["message"] == "there is nothing at /v1/nothing"


def test_a_developer_is_a_system(client: OpenAI) -> None:
    """OpenAI's newer clients call it so; the model's template does not."""
    messages: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    told = client.chat.completions.create(model="mesa", messages=messages, max_tokens=4, temperature=0)
    messages[0]["role"] = "system"
    again = client.chat.completions.create(model="mesa", messages=messages, max_tokens=4, temperature=0)
    assert told.choices[0].message.content == again.choices[0].message.content
    assert told.usage is not None and again.usage is not None
    assert told.usage.prompt_tokens == again.usage.prompt_tokens


def test_a_prompt_of_several_choices_is_counted_once(client: OpenAI) -> None:
    options: dict[str, Any] = dict(
        model="mesa", messages=[{"role": "user", "content": "Hello"}], max_tokens=4, temperature=0
    )
    one, three = (client.chat.completions.create(**options, n=n) for n in (1, 3))
    assert one.usage is not None and three.usage is not None
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 3 * one.usage.completion_tokens
    assert [choice.index for choice in three.choices] == [0, 1, 2]


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_are_vectors_of_length_one(client: OpenAI, encoding: Any) -> None:
    found = client.embeddings.create(model="mesa", input=["one", "two", "one"], encoding_format=encoding).data
    vectors = []
    for item in found:
        value: Any = item.embedding
        vectors.append(memoryview(base64.b64decode(value)).cast("f").tolist() if isinstance(value, str) else value)
    assert [item.index for item in found] == [0, 1, 2]
    assert sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-4)
    assert vectors[0] == vectors[2] != vectors[1]


# With documents.


def test_a_document_is_read_and_asked_about(client: OpenAI, document: dict[str, Any]) -> None:
    assert document["status"] == "processed" and document["mesa"]["tokens_read"] == document["mesa"]["tokens"] > 500
    question = "What is the door code of Ida Frost?"
    answer = client.chat.completions.create(model="mesa", messages=about(document["id"], question))
    message: Any = answer.choices[0].message
    assert str(CODES["Ida Frost"]) in message.content
    citation = message.annotations[0]
    assert citation.type == "file_citation" and citation.file_id == document["id"] and citation.literal
    assert str(CODES["Ida Frost"]) in citation.quote
    answered: Any = answer
    assert answered.mesa["read"]["tokens_computed"] == 0  # it was read before it was asked about
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens > 0.9 * answer.usage.prompt_tokens


def test_a_stream_about_a_document_ends_with_its_citations(server: Server, document: dict[str, Any]) -> None:
    body = {
        "messages": about(document["id"], "What is the door code of Tom Hale?"),
        "stream_options": {"include_usage": True},
    }
    *chunks, last, usage = server.events(body)
    assert str(CODES["Tom Hale"]) in "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["delta"]["annotations"][0]["file_id"] == document["id"]
    assert last["mesa"]["said"].startswith("read ") and last["mesa"]["said"].endswith("codes.txt")
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0


CODE: dict[str, Any] = {
    "type": "object",
    "properties": {"code": {"enum": [CODES["Ida Frost"]]}},
    "required": ["code"],
    "additionalProperties": False,
}
"""The bundled model copies sentences: what its answer says is given, and that it says that alone is asked."""
FORMS: list[Any] = [
    {"type": "json_schema", "json_schema": {"name": "code", "strict": True, "schema": CODE}},
    {"type": "json_object", "schema": CODE},
]


@pytest.mark.parametrize("form", FORMS, ids=["json_schema", "json_object"])
def test_json_about_a_document(client: OpenAI, document: dict[str, Any], form: Any) -> None:
    messages = about(document["id"], "What is the door code of Ida Frost?")
    options: dict[str, Any] = dict(model="mesa", messages=messages, max_tokens=64, response_format=form)
    answer = client.chat.completions.create(**options)
    message: Any = answer.choices[0].message
    assert json.loads(message.content) == {"code": CODES["Ida Frost"]}
    assert answer.choices[0].finish_reason == "stop"
    assert message.annotations[0].literal and str(CODES["Ida Frost"]) in message.annotations[0].quote
    answered: Any = answer
    assert answered.mesa["stands"] and answered.mesa["read"]["tokens_computed"] == 0
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said == message.content and chunks[-1].usage is not None and answer.usage is not None
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
    last: Any = chunks[-2].choices[0]
    assert last.finish_reason == "stop" and last.delta.annotations[0]["file_id"] == document["id"]


def test_any_json_about_a_document(client: OpenAI, document: dict[str, Any]) -> None:
    answer = client.chat.completions.create(
        model="mesa", messages=about(document["id"], "What is the door code of Tom Hale?"), max_tokens=120,
        response_format={"type": "json_object"},
    ).choices[0]  # fmt: skip
    assert answer.message.content is not None and answer.message.content.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)


def test_a_schema_that_cannot_be_used_is_told(server: Server, document: dict[str, Any]) -> None:
    body = {"messages": about(document["id"], "Who?")}
    wrong = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": wrong}}
    status, error = server.error("POST", "/v1/chat/completions", {**body, "response_format": form})
    assert status == 400 and "the schema of response_format" in error["message"]
    tool = {"type": "function", "function": {"name": "add", "parameters": wrong}}
    asked = {**body, "tools": [tool], "tool_choice": "required"}
    status, error = server.error("POST", "/v1/chat/completions", asked)
    assert status == 400 and "the schema of the tool add" in error["message"]
    asked = {**body, "tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}
    assert server.error("POST", "/v1/chat/completions", asked)[1]["param"] == "tool_choice"
    asked = {
        **body,
        "tools": [ADD, tool | {"function": {**tool["function"], "name": "sub"}}],
        "tool_choice": "required",
    }
    status, error = server.error("POST", "/v1/chat/completions", asked)
    assert status == 400 and "the schema of the tool sub" in error["message"]


def test_log_probabilities_about_a_document(client: OpenAI, document: dict[str, Any]) -> None:
    messages = about(document["id"], "What is the door code of Mara Lind?")
    options: dict[str, Any] = dict(model="mesa", messages=messages, logprobs=True, top_logprobs=2)
    (choice,) = client.chat.completions.create(**options).choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    tokens = choice.logprobs.content
    assert b"".join(bytes(token.bytes or ()) for token in tokens).decode().strip() == choice.message.content
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == token.logprob  # the temperature is 0: each is the likeliest one
    chunks = list(client.chat.completions.create(**options, stream=True))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content or ()]
    assert [t.token for t in streamed] == [t.token for t in tokens]
    answer = client.chat.completions.create(model="mesa", messages=messages)
    assert answer.choices[0].logprobs is None


def test_several_answers_about_a_document(client: OpenAI, document: dict[str, Any]) -> None:
    options: dict[str, Any] = dict(
        model="mesa", messages=about(document["id"], "What is the door code of Mara Lind?"), temperature=2, seed=7, top_p=1,
        extra_body={"top_k": 0, "min_p": 0},
    )  # fmt: skip
    one, three = (client.chat.completions.create(**options, max_tokens=12, n=n) for n in (1, 3))
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in three.choices]
    assert texts[0] == one.choices[0].message.content and len(set(texts)) > 1
    assert one.usage is not None and three.usage is not None
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens > one.usage.completion_tokens
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**options, max_tokens=12, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts


def test_a_tool_is_called_about_a_document(client: OpenAI, document: dict[str, Any]) -> None:
    opening: Any = {
        "type": "function",
        "function": {"name": "open_door", "description": "Opens a door.", "parameters": CODE},
    }
    question = "What is the door code of Eva Stone?"
    options: dict[str, Any] = dict(
        model="mesa", messages=about(document["id"], question), max_tokens=64, tools=[opening]
    )
    for choice in ("required", {"type": "function", "function": {"name": "open_door"}}):
        answer = client.chat.completions.create(**options, tool_choice=choice).choices[0]
        (call,) = answer.message.tool_calls or ()
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        assert call.type == "function" and call.function.name == "open_door"
        assert set(json.loads(call.function.arguments)) == {"code"}
        said: Any = answer.message
        assert said.annotations[0].file_id == document["id"]
    with client.chat.completions.stream(**options, tool_choice="required") as stream:
        (choice,) = stream.get_final_completion().choices
    (streamed,) = choice.message.tool_calls or ()
    assert streamed.function.arguments == call.function.arguments and streamed.function.name == "open_door"
    # what it gave, and the question again
    messages = [*options["messages"], {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
                {"role": "tool", "tool_call_id": call.id, "content": "The door is open."}]  # fmt: skip
    last: Any = client.chat.completions.create(model="mesa", messages=messages, tools=[opening])
    assert last.choices[0].message.content and last.choices[0].message.tool_calls is None
    assert last.mesa["read"]["tokens_computed"] == 0
    cut = client.chat.completions.create(**{**options, "max_tokens": 2}, tool_choice="required").choices[0]
    assert cut.finish_reason == "length"


def test_a_citation_is_found_in_the_text(server: Server, document: dict[str, Any]) -> None:
    body = {"messages": about(document["id"], "What is the door code of Eva Stone?")}
    citation = server.json("POST", "/v1/chat/completions", body)["choices"][0]["message"]["annotations"][0]
    path = f"/v1/files/{document['id']}/text?start={citation['start']}&stop={citation['stop']}"
    passage = server.json("GET", path)
    assert passage["text"] == citation["quote"] and passage["places"][0]["start"] <= passage["start"]


def test_progress_is_told_before_the_answer(server: Server) -> None:
    text = facts(200, {"Ann Vale": 22871})
    body = {"messages": [{"role": "user", "content": [
        {"type": "file", "file": {"file_data": base64.b64encode(text.encode()).decode(), "filename": "long.txt"}},
        {"type": "text", "text": "What is the door code of Ann Vale?"}]}], "progress": True, "read": "all"}  # fmt: skip
    chunks = list(server.events(body))
    told = [chunk["mesa"]["progress"] for chunk in chunks if "progress" in chunk.get("mesa", {})]
    assert told and told[-1]["tokens_read"] == told[-1]["tokens"] > 1000
    assert [p["tokens_read"] for p in told] == sorted(p["tokens_read"] for p in told)
    answer = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    assert "22871" in answer
    again = server.json("POST", "/v1/chat/completions", body)  # known by its content
    assert again["mesa"]["read"]["tokens_computed"] == 0


def test_a_document_that_was_pasted_is_read_once(server: Server) -> None:
    text = facts(170, {"Joe Marsh": 61748, "Lea Holt": 90210}).replace("ferry", "train")
    first = {"role": "user", "content": f"{text}\n\nWhat is the door code of Joe Marsh?"}
    answer = server.json("POST", "/v1/chat/completions", {"messages": [first]})
    assert "61748" in answer["choices"][0]["message"]["content"]
    assert answer["mesa"]["read"]["mode"] == "all" and answer["mesa"]["read"]["tokens_computed"] > 1000
    messages = [first, {"role": "assistant", "content": answer["choices"][0]["message"]["content"]},
                {"role": "user", "content": "What is the door code of Lea Holt?"}]  # fmt: skip
    answer = server.json("POST", "/v1/chat/completions", {"messages": messages})
    assert answer["mesa"]["read"]["tokens_computed"] == 0
    names = [file["filename"] for file in server.json("GET", "/v1/files")["data"]]
    assert not any(name.startswith("pasted") for name in names)  # hidden


def test_what_was_pasted_may_be_longer_than_the_context(server: Server) -> None:
    text = facts(900, {"Ray Dunn": 44120}).replace("ferry", "tram")
    body = {"messages": [{"role": "user", "content": f"What is the door code of Ray Dunn?\n\n{text}"}]}
    answer = server.json("POST", "/v1/chat/completions", body)
    assert answer["mesa"]["read"]["mode"] == "auto" and "44120" in answer["choices"][0]["message"]["content"]


def test_a_collection_is_a_vector_store(client: OpenAI, server: Server, document: dict[str, Any]) -> None:
    other = server.upload(b"The door code of Ann Vale is 11111.\n", "other.txt")["id"]
    store = client.vector_stores.create(name="work", file_ids=[document["id"]])
    assert store.file_counts.total == 1
    assert [found.name for found in client.vector_stores.list()] == ["work"]
    client.vector_stores.files.create(vector_store_id=store.id, file_id=other)
    assert {file.id for file in client.vector_stores.files.list(store.id)} == {document["id"], other}
    for name in ("work", store.id):
        body = {"messages": [{"role": "user", "content": "What is the door code of Ben Moor?"}], "collection": name}
        answer = server.json("POST", "/v1/chat/completions", body)
        assert str(CODES["Ben Moor"]) in answer["choices"][0]["message"]["content"]
    assert client.vector_stores.files.delete(other, vector_store_id=store.id).deleted
    assert [file.id for file in client.vector_stores.files.list(store.id)] == [document["id"]]
    assert client.vector_stores.delete(store.id).deleted
    assert client.files.retrieve(document["id"]).id == document["id"]  # the file stays
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.retrieve(store.id)


def test_files_by_the_client(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "Notes of März.md"
    path.write_text("# Notes\n\nThe door code of Ulla Berg is 55512.\n", encoding="utf-8")
    file = client.files.create(file=path, purpose="user_data")
    assert file.filename == path.name and file.bytes == path.stat().st_size
    assert file.id in [found.id for found in client.files.list()]
    assert client.files.content(file.id).read() == path.read_bytes()
    done = client.files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=30)
    assert done.status == "processed"
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_events_end_when_a_document_is_read(server: Server) -> None:
    file_id = server.upload(facts(300, {"Kim Rye": 40404}).encode())["id"]
    status, headers, data = server.ask("GET", f"/v1/files/{file_id}/events")
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: ")]
    assert events[-1]["mesa"]["state"] == "ready" and events[-1]["mesa"]["tokens_read"] == events[-1]["mesa"]["tokens"]
    read = [event["mesa"]["tokens_read"] for event in events]
    assert read == sorted(read)


def test_what_is_no_document_says_why(server: Server) -> None:
    file = server.wait_for(server.upload(b"\x89PNG\r\n\x1a\n" + bytes(100), "picture.png")["id"])
    assert file["status"] == "error" and "picture.png" in file["status_details"]
    status, error = server.error("POST", "/v1/chat/completions", {"messages": about(file["id"], "What is it?")})
    assert status == 400 and "picture.png" in error["message"]


def test_conversations_of_the_page_are_kept(server: Server) -> None:
    body = {"title": "Über Häfen", "turns": [1, 2]}
    assert server.json("PUT", "/page/conversations/a-1", body)["id"] == "a-1"
    assert server.json("GET", "/page/conversations/a-1") == body
    assert server.json("GET", "/page/conversations")["conversations"][0]["title"] == "Über Häfen"
    assert server.json("DELETE", "/page/conversations/a-1") == {"id": "a-1", "deleted": True}
    assert server.error("GET", "/page/conversations/a-1")[0] == 404
    assert server.error("PUT", "/page/conversations/a.b", body)[0] == 400
    assert server.error("PUT", "/page/conversations/a", [1])[0] == 400
    assert server.error("PUT", "/page/conversations/a", b"[" * 5_000_000)[0] == 413
    for no_json in (
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        '{"a": 1}'.encode("utf-16"),
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": "\xff"}',
    ):
        assert server.error("PUT", "/page/conversations/a", no_json)[0] == 400


# Errors, and giving up.


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "temperature": -1}, "temperature"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x"}], "read": "some"}, "read"),
        ({"messages": [{"role": "user", "content": "x"}], "stop": [1]}, "stop"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]}]},
            "messages",
        ),
    ],
)
def test_a_wrong_field_is_named(server: Server, body: Any, param: str) -> None:
    status, error = server.error("POST", "/v1/chat/completions", body)
    assert status == 400 and error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param)


def test_a_prompt_that_is_too_long_is_told(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="mesa", prompt="word " * 20_000)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.slow
def test_a_stock_model_answers_and_reads_no_documents(tmp_path: Path) -> None:
    with Server(tmp_path, "--n-ctx", "512", "--stock") as server:
        assert server.json("POST", "/v1/completions", {"prompt": "The", "max_tokens": 1})["choices"]
        body, kind = form(b"The door code is 1.", "a.txt")
        status, error = server.error("POST", "/v1/files", body, headers={"Content-Type": kind})
        assert status == 400 and error["code"] == "no_documents" and "stock" in error["message"]
        assert server.json("GET", "/v1/files")["data"] == []


@pytest.mark.parametrize("data", ["", "é", "data:application/pdf;base64,%%%", "data:text/plain,hello"])
def test_file_data_that_is_none(server: Server, data: str) -> None:
    part = {"type": "file", "file": {"file_data": data, "filename": "a.pdf"}}
    body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]}
    assert server.error("POST", "/v1/chat/completions", body)[0] == 400


def test_what_is_not_there_is_told(server: Server) -> None:
    for method, path in (("GET", "/v1/files/file-0"), ("DELETE", "/v1/files/file-0"), ("GET", "/v1/files/file-0/content"),
                         ("GET", "/v1/files/file-0/events"), ("GET", "/v1/vector_stores/vs_0"), ("GET", "/v1/nothing")):  # fmt: skip
        assert server.error(method, path)[0] == 404
    assert server.error("POST", "/v1/models", {})[0] == 405


def test_a_client_that_goes_away_is_cancelled(server: Server, client: OpenAI) -> None:
    before = counted(server, "mesa_cancelled_total")
    with client.completions.create(model="mesa", prompt="The", max_tokens=8000, temperature=2, stream=True) as stream:
        next(iter(stream))
    end = time.monotonic() + 5
    while counted(server, "mesa_cancelled_total") == before:
        assert time.monotonic() < end
        time.sleep(0.02)
    begin = time.monotonic()
    client.completions.create(model="mesa", prompt="The", max_tokens=1)
    assert time.monotonic() - begin < 2


def test_what_is_deleted_while_a_question_waits_is_told(server: Server) -> None:
    file = server.wait_for(server.upload(b"The ferry of Ida Frost leaves at noon.\n" * 20, "gone.txt")["id"])
    busy = server.events(
        {"prompt": "x", "max_tokens": 4000, "logit_bias": {"0": -100, "1": -100, "2": -100}}, "/v1/completions"
    )
    next(busy)
    question = {
        "messages": [{"role": "user", "content": "When does the ferry leave?"}],
        "documents": [file["id"]],
        "max_tokens": 4,
    }
    told: list[Any] = []
    asking = threading.Thread(target=lambda: told.append(server.error("POST", "/v1/chat/completions", question)))
    asking.start()
    end = time.monotonic() + 20
    while b"mesa_queue_waiting 1.0" not in server.ask("GET", "/metrics")[2]:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert server.json("DELETE", f"/v1/files/{file['id']}")["deleted"]
    busy.close()  # type: ignore[attr-defined]
    asking.join(60)
    ((status, error),) = told
    assert status == 404 and error["message"] == "gone.txt was deleted"


def test_a_long_reading_gives_way_to_short_questions(server: Server) -> None:
    """At the borders of chunks: what was read so far is kept, and the answer comes in the end."""
    text = facts(500, {"Joe Marsh": 61748}).replace("ferry", "coach")
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "What is the door code of Joe Marsh?"}],
        "read": 6000,
        "progress": True,
        "user": "long",
    }
    file = {"file_data": base64.b64encode(text.encode()).decode(), "filename": "long.txt"}
    body["messages"] = [
        {
            "role": "user",
            "content": [
                {"type": "file", "file": file},
                {"type": "text", "text": "What is the door code of Joe Marsh?"},
            ],
        }
    ]
    order: list[str] = []
    chunks: list[dict[str, Any]] = []

    def ask_long() -> None:
        chunks.extend(server.events(body))
        order.append("long")

    before = counted(server, "mesa_wait_seconds_count")
    thread = threading.Thread(target=ask_long)
    thread.start()
    while counted(server, "mesa_wait_seconds_count") == before:
        time.sleep(0.01)
    for _ in range(3):
        server.json("POST", "/v1/completions", {"prompt": "The", "max_tokens": 1, "user": "short"})
        order.append("short")
    thread.join()
    assert order.index("short") < order.index("long")
    assert "61748" in "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    told = [chunk["mesa"]["progress"]["tokens_read"] for chunk in chunks if "progress" in chunk.get("mesa", {})]
    assert told == sorted(set(told))  # nothing is read twice
    assert chunks[-1]["mesa"]["read"]["tokens_computed"] == told[-1]


def counted(server: Server, name: str) -> float:
    lines = server.ask("GET", "/metrics")[2].decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def test_many_at_once_each_get_their_own(server: Server) -> None:
    def say(n: int) -> str:
        name = f"Guest {chr(65 + n)}"
        prompt = (
            f"The door code of {name} is {10_000 + 137 * n}.\n\nQuestion: What is the door code of {name}?\nAnswer:"
        )
        body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "stop": "\n", "user": name}
        text: str = server.json("POST", "/v1/completions", body)["choices"][0]["text"]
        return text

    alone = [say(n) for n in range(8)]
    assert len(set(alone)) == 8
    together: list[tuple[int, str]] = []
    threads = [threading.Thread(target=lambda n=n: together.extend((n, say(n)) for _ in range(3))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 24 and all(text == alone[n] for n, text in together)


@pytest.mark.slow
def test_a_conversation_about_a_document_with_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    with Server(tmp_path, "--n-ctx", "4096", model=smollm2) as server:
        file_id = server.wait_for(server.upload(facts(20).encode(), "codes.txt")["id"])["id"]
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": "Answer with one short sentence."},
            *about(file_id, "What is the door code of Mara Lind?"),
        ]
        first = server.json("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 24})
        text = first["choices"][0]["message"]["content"]
        assert str(CODES["Mara Lind"]) in text
        messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": "And what is that of Eva Stone?"},
        ]
        second = server.json("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 24})
        assert "Eva Stone" in second["choices"][0]["message"]["content"]  # it knows what "that" is
        assert second["mesa"]["read"]["tokens_computed"] == 0
        usage = second["usage"]  # the conversation so far stands in the context
        n_new = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        assert n_new < usage["prompt_tokens"] - first["usage"]["prompt_tokens"] + 40
        schema = {"type": "object", "properties": {"code": {"type": "integer"}}, "required": ["code"]}
        form = {"type": "json_schema", "json_schema": {"name": "code", "schema": schema}}
        asked = {"messages": about(file_id, "What is the door code of Mara Lind?"), "response_format": form}
        answer = server.json("POST", "/v1/chat/completions", {**asked, "max_tokens": 24})["choices"][0]
        assert json.loads(answer["message"]["content"]) == {"code": CODES["Mara Lind"]}
        assert answer["message"]["annotations"][0]["literal"]

        def count(content: str) -> int:
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            n: int = server.json("POST", "/v1/chat/completions", body)["usage"]["prompt_tokens"]
            return n

        assert count("<|im_end|>") - count("") > 3  # what a message spells is text: as one token it would be 1

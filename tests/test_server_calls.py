"""Calls of tools: the grammar of one of several, and its text as OpenAI's tool calls, however it is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the server is the extra [server]")

from mesa_gguf import grammar
from mesa_gguf.errors import ConfigError
from mesa_gguf.sampling import _ANY_CHAR
from mesa_gguf.server.calls import Forced, Spoken

FREE: dict[str, Any] = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
NESTED: dict[str, Any] = {
    "type": "object", "properties": {"at": {"$ref": "#/$defs/Place"}, "n": {"type": "integer", "minimum": 0}},
    "required": ["at"], "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "number"}}}},
}  # fmt: skip
FORCED = Forced(({"name": "say", "parameters": FREE}, {"name": "go.to", "parameters": NESTED}))

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def test_the_rules_of_each_function_are_its_own() -> None:
    made = FORCED.grammar
    grammar.check(made)
    lines = made._grammar.splitlines()
    names = [line.split(" ::= ")[0] for line in lines]
    assert names[0] == "root" and len(names) == len(set(names))
    assert all(name.startswith(("call0-", "call1-")) for name in names[1:])
    assert '"{\\"name\\": \\"go.to\\", \\"arguments\\": " call1-root "}"' in lines[0]
    assert len(_ANY_CHAR.findall(made._grammar)) == 1  # say's text: JSON has no line breaks in it


def test_a_wrong_schema_is_told_by_the_functions_name() -> None:
    wrong = Forced((*FORCED.functions, {"name": "bad", "parameters": {"$ref": "#/nowhere"}}))
    with pytest.raises(ConfigError, match="the schema of the tool bad"):
        assert wrong.grammar


@given(st.sampled_from(["say", "go.to"]), st.dictionaries(st.text(max_size=4), values, max_size=4), st.data())
def test_any_pieces_make_the_same_call(name: str, arguments: dict[str, Any], data: st.DataObject) -> None:
    said = json.dumps(arguments, ensure_ascii=data.draw(st.booleans()))
    text = f'{{"name": "{name}", "arguments": {said}}}'
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    length = data.draw(st.sampled_from([len(text), len(text), data.draw(st.integers(0, len(text) - 1))]))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    if length < len(text):
        pieces = [piece for a, piece in zip([0, *cuts], pieces) for piece in [piece[: max(0, length - a)]] if piece]
    spoken = Spoken(FORCED, False)
    deltas = [spoken.begin(), *(spoken.delta(piece) for piece in pieces), spoken.end()]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    content = "".join(delta.get("content") or "" for delta in deltas)
    message = Spoken(FORCED, False).whole(text[:length])
    if not calls:
        assert content == text[:length] == (message["content"] or "")
        return
    assert [call["function"].get("name") for call in calls] == [name] + [None] * (len(calls) - 1)
    streamed = "".join(call["function"]["arguments"] for call in calls)
    assert content == "" and streamed == message["tool_calls"][0]["function"]["arguments"]
    assert streamed == (said if length == len(text) else said[: max(0, length - text.index(said))])

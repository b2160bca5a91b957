"""Tools that the model must call: a grammar leaves it no other answer, and the answer becomes OpenAI's tool calls."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llama_cpp.llama_grammar import LlamaGrammar

from ..chat import grammar_of
from ..reading.reader import TokenLogprob
from .problems import Problem
from .schemas import ChatRequest, ToolChoice

ONE = "A function that can be called:\n{functions}\nAnswer with a call of {name}: its arguments as JSON."
SEVERAL = (
    "Functions that can be called:\n{functions}\n"
    'Answer with a call of the one that fits: JSON with its "name" and "arguments".'
)
_BEGIN, _MIDDLE, _END = '{"name": "', '", "arguments": ', "}"
_CALLED = re.compile(re.escape(_BEGIN) + '([^"]*)' + re.escape(_MIDDLE))
# literals, classes and counts hold no names of rules
_GBNF = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\{[0-9, ]*\}|[a-zA-Z0-9-]+')


@dataclass(frozen=True)
class Forced:
    """The functions of which the model must call one.

    Attributes:
        functions: as in the request, each of another name.
    """

    functions: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str | None:
        """Of the only one; the model chooses among several."""
        return self.functions[0]["name"] if len(self.functions) == 1 else None

    @property
    def instruction(self) -> str:
        """What the model is told where its chat template does not tell it."""
        functions = "\n".join(json.dumps(function, ensure_ascii=False) for function in self.functions)
        return (SEVERAL if self.name is None else ONE).format(functions=functions, name=self.name)

    @cached_property
    def grammar(self) -> LlamaGrammar:
        """Of the arguments where there is one function; else of its name and the arguments, in this order.

        Raises:
            ConfigError: a function's schema cannot be used; names it.
        """
        each = [_grammar(function) for function in self.functions]
        if self.name is not None:
            return each[0]
        calls, rules = [], []
        for n, (function, grammar) in enumerate(zip(self.functions, each)):
            own = f"call{n}-"
            begin = (_BEGIN + function["name"] + _MIDDLE).replace('"', '\\"')
            calls.append(f'"{begin}" {own}root "{_END}"')
            rules.append(_renamed(grammar._grammar, own))
        return LlamaGrammar.from_string("\n".join(["root ::= " + " | ".join(calls), *rules]), verbose=False)


def _grammar(function: Mapping[str, Any]) -> LlamaGrammar:
    schema = {"type": "json_object", "schema": function["parameters"]}
    found = grammar_of(schema, f"the tool {function['name']}")
    assert found is not None
    return found


def _renamed(gbnf: str, own: str) -> str:
    """A grammar whose rules' names begin with their own word."""
    return _GBNF.sub(lambda found: found[0] if found[0][0] in '"[{' else own + found[0], gbnf)


def tools_of(request: ChatRequest) -> tuple[list[dict[str, Any]], Forced | None]:
    """The tools that the model is told of, and those of which it must call one.

    Raises:
        Problem: it must call one that is not there.
    """
    choice = request.tool_choice
    if not request.tools or choice == "none":
        if isinstance(choice, ToolChoice) or choice == "required":
            raise Problem(400, "tool_choice without tools", "invalid_value", param="tool_choice")
        return [], None
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if choice == "required":
        return tools, Forced(tuple(functions.values()))
    if not isinstance(choice, ToolChoice):
        return tools, None
    if choice.function.name not in functions:
        raise Problem(400, f"there is no tool {choice.function.name}", "invalid_value", param="tool_choice")
    return tools, Forced((functions[choice.function.name],))


class Spoken:
    """An answer as OpenAI has it: a text, or the call of a tool.

    Args:
        forced: what it calls one of; None: it is a text.
        logprobs: they are told.
    """

    def __init__(self, forced: Forced | None, logprobs: bool) -> None:
        self._forced, self._tells = forced, logprobs
        self._id = f"call_{uuid.uuid4().hex}"
        self._told = 0
        self._name = forced.name if forced is not None else None
        self._said = ""
        self._text = (
            ""  # of an answer whose function is not known yet; then of the arguments, as far as it may be their end
        )

    def begin(self) -> dict[str, Any]:
        if self._forced is None:
            return {"role": "assistant", "content": ""}
        if self._name is None:
            return {"role": "assistant", "content": None}
        return {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **self._call("")}]}

    def delta(self, piece: str) -> dict[str, Any]:
        """What a piece of the answer adds."""
        if self._forced is None:
            return {"content": piece}
        if self._forced.name is not None:
            return self._more(piece)
        self._said += piece
        self._text += piece
        if self._name is None:
            found = _CALLED.match(self._text)
            if found is None:
                return {}
            self._name, self._text = found[1], self._text[found.end() :]
            return {"tool_calls": [{"index": 0, **self._call(self._certain())}]}
        return self._more(self._certain())

    def end(self) -> dict[str, Any]:
        """What is left when no more pieces come."""
        rest, self._text = self._text, ""
        if self._forced is None or self._forced.name is not None:
            return {}
        if self._name is None:
            return {"content": rest} if rest else {}
        return self._more(_arguments(self._said, rest))

    def whole(self, text: str) -> dict[str, Any]:
        """The message of an answer that came in one piece."""
        if self._forced is None:
            return {"role": "assistant", "content": text}
        if self._forced.name is None:
            found = _CALLED.match(text)
            if found is None:  # cut before it said what it calls
                return {"role": "assistant", "content": text}
            self._name, text = found[1], _arguments(text, text[found.end() :])
        return {"role": "assistant", "content": None, "tool_calls": [self._call(text)]}

    def choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A choice of a chat without documents, in a stream or whole, whose text may be that of a call."""
        if self._forced is None:
            return choice
        finish = choice["finish_reason"]
        if "message" in choice:
            message = self.whole(choice["message"]["content"])
            return {**choice, "message": message, "finish_reason": self.reason(finish)}
        given = choice["delta"]
        delta = self.begin() if "role" in given else self.delta(given["content"]) if given.get("content") else {}
        if finish is None:
            return {**choice, "delta": delta}
        return {**choice, "delta": {**delta, **self.end()}, "finish_reason": self.reason(finish)}

    def reason(self, finish: str) -> str:
        """OpenAI's name of why it ended: a stop string may have cut it before it said what it calls."""
        return "tool_calls" if self._name is not None and finish == "stop" else finish

    def _certain(self) -> str:
        """The text without what may be the end of the call, and is none of the arguments."""
        kept = len(self._text.rstrip(" " + _END))
        certain, self._text = self._text[:kept], self._text[kept:]
        return certain

    def _more(self, arguments: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]} if arguments else {}

    def _call(self, arguments: str) -> dict[str, Any]:
        return {"id": self._id, "type": "function", "function": {"name": self._name, "arguments": arguments}}

    def logprobs(self, known: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Those that were not told yet."""
        if not self._tells:
            return None
        new, self._told = known[self._told :], len(known)
        return {"content": [_logprob(token) for token in new], "refusal": None}


def _arguments(said: str, rest: str) -> str:
    """The end of the arguments without that of the call, where that was reached."""
    try:
        json.loads(said)
    except ValueError:
        return rest
    return rest.rstrip().removesuffix(_END)


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    def entry(data: bytes, logprob: float) -> dict[str, Any]:
        # a number that JSON has, where a token cannot be at all
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": max(logprob, -9999.0)}

    top = [entry(data, logprob) for _, data, logprob in token.top]
    return {**entry(token.data, token.logprob), "top_logprobs": top}

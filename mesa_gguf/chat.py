"""What `create_chat_completion` is given, checked before anything is read."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias, cast

from jinja2 import TemplateError
from llama_cpp.llama_chat_format import (
    Jinja2ChatFormatter,
    LlamaChatCompletionHandlerNotFoundException,
    get_chat_completion_handler,
)
from llama_cpp.llama_grammar import JSON_GBNF, LlamaGrammar

from . import grammar
from .errors import ConfigError, PromptError
from .text import check_text

MesaLlama: TypeAlias = Any  # that of llama.py, which is a floor above

COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
MAX_COUNT = 20_000  # takes a third of a second
_BRACES = re.compile(r"\{([0-9]{0,18})[0-9]*(?:,([0-9]{0,18})[0-9]*)?\}")
FALLBACK = "llama-2"  # the format that llama_cpp.Llama takes for a model without a chat template

# chat formats of llama-cpp-python are made of these; messages with others are left out there
ROLES = ("system", "user", "assistant", "tool", "function")


def check(llm: MesaLlama, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `create_chat_completion` as its chat handlers can take them.

    Raises:
        PromptError: the messages are none, or the chat template refuses them; says which.
        ConfigError: response_format, tools or chat_format cannot work.
    """
    arguments = dict(arguments)
    for name in ("messages", "functions", "tools", "response_format"):
        check_text(arguments.get(name), name)
    for name in ("functions", "tools"):
        given = arguments.get(name)
        for i, one in enumerate(given if isinstance(given, (list, tuple)) else ()):
            _check_count(one, f"{name}[{i}]")
    if llm.chat_handler is None:  # one that the caller brings may read more than text
        _check_format(llm)
        arguments["messages"] = _messages(arguments["messages"])
        template = _template(llm)
        if template is not None:
            arguments["messages"] = _render(llm, template, arguments)
        else:
            for i, message in enumerate(arguments["messages"]):
                if message["role"] not in ROLES:
                    raise PromptError(
                        f'messages[{i}] has the role {message["role"]!r}: the chat format "{llm.chat_format}" knows {", ".join(ROLES)}'
                    )
        for name in ("messages", "functions", "tools"):  # what they say is text, whatever it spells
            if arguments.get(name) is not None:
                arguments[name] = llm._model.made_plain(arguments[name])
    arguments.update(_response_format(arguments))
    if arguments.get("logprobs") and arguments.get("top_logprobs") is None:
        arguments["top_logprobs"] = 0  # those of the answer's tokens, without others; llama_cpp.Llama would give none
    return arguments


def _check_format(llm: MesaLlama) -> None:
    if llm.chat_format not in llm._chat_handlers:
        try:
            get_chat_completion_handler(str(llm.chat_format))
        except LlamaChatCompletionHandlerNotFoundException as err:
            raise ConfigError(f"chat_format is {llm.chat_format!r}: there is none of that name ({err})") from None
    if llm._guessed_chat_format and llm.chat_format == FALLBACK:
        llm._guessed_chat_format = False
        others = ", ".join(f'"{name}"' for name in llm._chat_handlers)
        warnings.warn(
            f"{llm.model_path}: this model has no chat template{f' by default (it has {others})' if others else ''}, so messages are "
            f'written as "{FALLBACK}" has them, which it may not know. Choose another way with chat_format="chatml" or the like, or '
            f'chat_handler; chat_format="{FALLBACK}" keeps this one',
            stacklevel=4,
        )


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, (list, tuple)):
        raise PromptError(f"messages is {type(messages).__name__}: it must be a list of messages with role and content")
    if not messages:
        raise PromptError("messages is empty: give at least one message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(f"{name} is {type(message).__name__}: it must have role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise PromptError(
            f'{name} has {"no role" if role is None else f"the role {role!r}"}: it must be "user", "system" or the like'
        )
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = "\n".join(_part(part, f"{name}.content[{i}]") for i, part in enumerate(content))
    elif content is None:
        if role != "assistant" or not (message.get("tool_calls") or message.get("function_call")):
            raise PromptError(f"{name} has no content: only a message of the assistant with tool_calls may have none")
    elif not isinstance(content, str):
        raise PromptError(f"{name}.content is {type(content).__name__}: it must be a text or a list of text parts")
    return {**message, "content": content}


def _part(part: Any, name: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise PromptError(f'{name} is {kind!r}: this model reads text, {{"type": "text", "text": "…"}}')


def _template(llm: MesaLlama) -> str | None:
    """The template of the model's own that messages are written by."""
    if llm.chat_format not in llm._chat_handlers:
        return None
    name = "chat_template" if llm.chat_format == "chat_template.default" else llm.chat_format
    template: str | None = llm.metadata.get(f"tokenizer.{name}")
    return template


def _render(llm: MesaLlama, template: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages, with content that the template can take where there is none.

    Some templates ask whether there is content, others put "None" there or fail: those get an empty one.
    """
    model = llm._model
    bos, eos = (model.token_get_text(token) if token != -1 else "" for token in (llm.token_bos(), llm.token_eos()))
    formatter = Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)
    options = {name: arguments.get(name) for name in ("functions", "function_call", "tools", "tool_choice")}

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            prompt: str = formatter(messages=cast(Any, messages), **options).prompt
        except (TemplateError, ValueError, TypeError, AttributeError, LookupError) as err:
            raise PromptError(f"the model's chat template refuses these messages: {err}") from None
        return prompt

    messages: list[dict[str, Any]] = arguments["messages"]
    if all(message["content"] is not None for message in messages):
        render(messages)
        return messages
    filled = [{**message, "content": message["content"] or ""} for message in messages]
    prompt = render(filled)
    try:
        fails = render(messages).count("None") > prompt.count("None")
    except PromptError:
        fails = True
    return filled if fails else messages


def tells_tools(llm: MesaLlama) -> bool:
    """Whether the model's chat template tells it of tools."""
    template = _template(llm)
    return template is not None and "tools" in template


def _response_format(arguments: dict[str, Any]) -> dict[str, Any]:
    """response_format, and the grammar of its schema: a chat handler would take any JSON where there is none."""
    wanted = arguments.get("response_format")
    if wanted is None:
        return {}
    schema = _schema(wanted)
    if schema is not None:
        return {"response_format": None, "grammar": _grammar_of_schema(schema)}
    return {"response_format": None if wanted["type"] == "text" else {"type": "json_object"}}


def grammar_of(
    response_format: Mapping[str, Any] | LlamaGrammar | None, what: str = "response_format"
) -> LlamaGrammar | None:
    """The grammar of an answer in a form that OpenAI's API knows, or in one that has a grammar already; None for text.

    Args:
        what: has the schema, for messages.

    Raises:
        ConfigError: there is no such form, or its schema cannot be made a grammar.
    """
    if response_format is None or isinstance(response_format, LlamaGrammar):
        return response_format
    schema = _schema(response_format)
    if schema is not None:
        return _grammar_of_schema(schema, what)
    return None if response_format["type"] == "text" else LlamaGrammar.from_string(JSON_GBNF, verbose=False)


def _schema(wanted: Any) -> Any:
    """The schema of a response_format, which has a type that is known; None: it has none."""
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise ConfigError(f'response_format is {wanted!r}: its type must be "text", "json_object" or "json_schema"')
    if kind == "json_schema":
        inner = wanted.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if schema is None:
            raise ConfigError('response_format has no schema: {"type": "json_schema", "json_schema": {"schema": …}}')
        return schema
    return wanted.get("schema") if kind == "json_object" else None


def _grammar_of_schema(schema: Any, what: str = "response_format") -> LlamaGrammar:
    _check_count(schema, f"the schema of {what}")
    try:
        return _made_of(json.dumps(schema))
    except ConfigError as err:
        raise ConfigError(f"the schema of {what} cannot be used: {err}") from None
    except Exception as err:  # whatever the converter stumbles over
        raise ConfigError(f"the schema of {what} cannot be made a grammar: {type(err).__name__}: {err}") from None


@lru_cache(maxsize=8)  # a program sends the same one with each request
def _made_of(schema: str) -> LlamaGrammar:
    made = LlamaGrammar.from_json_schema(schema, verbose=False)
    grammar.check(made)
    return made


def _check_count(schema: Any, what: str) -> None:
    """Refuse a schema that counts to too much: the converter writes what is counted so many times, however many that are."""
    n = _count(schema)
    if n > MAX_COUNT:
        raise ConfigError(
            f"{what} counts to {n} in minItems, maxLength, patterns and the like: the most is {MAX_COUNT} in all"
        )


def _count(schema: Any) -> int:
    """All that a schema counts to."""
    n, left = 0, [schema]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            n += sum(v for k, v in value.items() if k in COUNTS and isinstance(v, int) and v > 0)
            pattern = value.get("pattern")
            if isinstance(pattern, str):
                n += sum(int(found) for braces in _BRACES.findall(pattern) for found in braces if found)
            left += value.values()
        elif isinstance(value, (list, tuple)):
            left += value
    return n

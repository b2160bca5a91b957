"""GBNF grammars are checked before llama.cpp gets them, which crashes on what it cannot parse, and on some that it can.

llama.cpp returns nothing for a grammar that it cannot use, having printed the reason; it recurses once for each open
parenthesis and each rule that begins with another one, and works through every way in which a rule can begin.
"""

from __future__ import annotations

import string
from typing import Any

from .errors import ConfigError
from .text import check_text

MAX_REPETITIONS = 2000  # MAX_REPETITION_THRESHOLD of llama-grammar.cpp
MAX_ELEMENTS = 2_000_000  # of all rules together, 8 bytes each in llama.cpp
MAX_NESTING = 4000  # parentheses, 2 MB of stack; JSON schemas nest up to 2000
MAX_DEPTH = 10_000  # rules that begin with one another, 2 MB of stack
MAX_BEGINNINGS = 100_000  # ways in which a rule can begin; llama.cpp compares each with all others

NAME = frozenset(string.ascii_letters + string.digits + "-")
DIGITS = frozenset(string.digits)
ESCAPES = frozenset('trn\\"[]-')
HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}

Rule = list[list["str | None"]]
"""Alternatives, each a sequence of rules' names and of characters or tokens (None)."""


def check(grammar: Any) -> None:
    """Refuse a `LlamaGrammar` that llama.cpp cannot use.

    Raises:
        ConfigError: it is none, or no grammar of GBNF; names the place.
    """
    text, root = getattr(grammar, "_grammar", None), getattr(grammar, "_root", None)
    if not isinstance(text, str) or not isinstance(root, str):
        raise ConfigError(
            f"grammar is {type(grammar).__name__}: make one with LlamaGrammar.from_string or from_json_schema"
        )
    check_text(text, "the grammar")
    if "\0" in text:
        raise ConfigError("the grammar cannot be used: it holds a NUL character")
    rules = _Parser(text).parse()
    if root not in rules:
        names = ", ".join(name for name in rules if "_" not in name)
        raise ConfigError(
            f"the grammar cannot be used: it has no rule named {root}, with which it begins (its rules: {names[:200]})"
        )
    _check_beginnings(rules)


class _Parser:
    """Parses as llama_grammar_parser does, and makes the same rules."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.rules: dict[str, Rule] = {}
        self.used: dict[str, int] = {}  # name -> where
        self.names: set[str] = set()  # used or defined
        self.n_elements = 0
        self.n_names = 0

    def parse(self) -> dict[str, Rule]:
        at = self.space(0, True)
        while at < len(self.text):
            at = self.rule(at)
        if not self.rules:
            raise ConfigError("the grammar cannot be used: it has no rules")
        for name, at in self.used.items():
            if name not in self.rules:
                raise self.error(f"there is no rule named {name}", at)
        return self.rules

    def error(self, what: str, at: int) -> ConfigError:
        line = self.text.count("\n", 0, at) + 1
        column = at - (self.text.rfind("\n", 0, at) + 1) + 1
        near = self.text[at : at + 20].split("\n")[0]
        where = f"line {line}, column {column}" + (f", at {near!r}" if near else "")
        return ConfigError(f"the grammar cannot be used: {what} ({where})")

    def char(self, at: int) -> str:
        return self.text[at] if at < len(self.text) else ""

    def space(self, at: int, newlines: bool) -> int:
        blank = " \t\r\n" if newlines else " \t"
        while (c := self.char(at)) and (c in blank or c == "#"):
            at += 1
            if c == "#":
                while (c := self.char(at)) and c not in "\r\n":
                    at += 1
        return at

    def run(self, at: int, characters: frozenset[str], what: str) -> int:
        end = at
        while self.char(end) in characters:
            end += 1
        if end == at:
            raise self.error(f"{what} is expected", at)
        return end

    def new_name(self, base: str) -> str:
        self.n_names += 1
        return f"{base.split('_')[0]}_{self.n_names}"  # no name of the text has _

    def rule(self, at: int) -> int:
        end = self.run(at, NAME, "the name of a rule (letters, digits and -)")
        name = self.text[at:end]
        self.names.add(name)
        at = self.space(end, False)
        if self.text[at : at + 3] != "::=":
            raise self.error(f"::= is expected after {name}", at)
        at = self.alternatives(self.space(at + 3, True), name)
        if self.char(at) not in ("", "\r", "\n"):
            raise self.error("the end of the line is expected", at)
        return self.space(at, True)

    def alternatives(self, at: int, name: str) -> int:
        # (name, alternatives, place in the text, names until then)
        open_rules: list[tuple[str, Rule, int, int]] = [(name, [[]], at, 0)]
        last = 0  # where the last symbol starts in the last alternative
        repeated = 1  # rules that repeating it would repeat
        while True:
            name, rule, opened, n_names = open_rules[-1]
            sequence, nested = rule[-1], len(open_rules) > 1
            c = self.char(at)
            if c in ('"', "[", "<", "!", ".") and c:
                last, repeated = len(sequence), 1
                at, n = self.terminal(at)
                sequence.extend([None] * n)
                self.count(n, at)
            elif c in NAME:
                end = self.run(at, NAME, "a name")
                last, repeated = len(sequence), 1
                sequence.append(self.text[at:end])
                self.used.setdefault(self.text[at:end], at)
                self.names.add(self.text[at:end])
                at = end
            elif c == "(":
                if len(open_rules) > MAX_NESTING:
                    raise self.error(f"more than {MAX_NESTING} parentheses are open", at)
                n_names = self.n_symbols()
                open_rules.append((self.new_name(name), [[]], at, n_names))
                at, last = self.space(at + 1, True), 0
                continue
            elif c == ")" and nested:
                self.rules[name] = rule
                open_rules.pop()
                sequence, nested = open_rules[-1][1][-1], len(open_rules) > 1
                last, repeated = len(sequence), max(1, self.n_symbols() - n_names)
                sequence.append(name)
                self.count(1, at)
                at += 1
            elif c and c in "*+?{":
                at, repeated = self.repetition(at, name, sequence, last, repeated, nested)
            elif c == "|":
                rule.append([])
                at, last = self.space(at + 1, True), 0
                continue
            else:
                if nested and not c:
                    raise self.error("this parenthesis is not closed", opened)
                if nested:
                    raise self.error("an unexpected character", at)
                self.rules[name] = rule
                return at
            at = self.space(at, nested)

    def terminal(self, at: int) -> tuple[int, int]:
        """-> (end, number of elements)."""
        c, begin, n = self.char(at), at, 0
        if c == ".":
            return at + 1, 1
        if c in "<!":
            at += c == "!"
            if self.char(at) != "<":
                raise self.error("a token in < and > is expected", at)
            end = self.text.find(">", at)
            if end < 0:
                raise self.error("this token is not closed with >", at)
            inner = self.text[at + 1 : end]
            if inner.startswith("["):
                digits = inner[1:-1]
                if not (inner.endswith("]") and digits and set(digits) <= DIGITS and int(digits) < 2**31):
                    raise self.error("a token's number in <[ and ]> is expected", at)
            return end + 1, 1
        closing = '"' if c == '"' else "]"
        at += 1
        if closing == "]" and self.char(at) == "^":
            at += 1
        while (c := self.char(at)) != closing:
            if not c:
                raise self.error("this string is not closed" if closing == '"' else "this [ is not closed", begin)
            at = self.character(at)
            n += 1
            if closing == "]" and self.char(at) == "-" and self.char(at + 1) != "]":
                if not self.char(at + 1):
                    raise self.error("this [ is not closed", begin)
                at = self.character(at + 1)
        # a class of any length is one element to what follows
        return at + 1, n if closing == '"' else min(n, 1)

    def character(self, at: int) -> int:
        if self.char(at) != "\\":
            return at + 1
        c = self.char(at + 1)
        if c in HEX_ESCAPES:
            digits = self.text[at + 2 : at + 2 + HEX_ESCAPES[c]]
            if len(digits) < HEX_ESCAPES[c] or not set(digits) <= set(string.hexdigits):
                raise self.error(f"{HEX_ESCAPES[c]} hexadecimal digits are expected after \\{c}", at)
            return at + 2 + HEX_ESCAPES[c]
        if c not in ESCAPES or not c:
            raise self.error(f"there is no escape \\{c}", at)
        return at + 2

    def repetition(
        self, at: int, name: str, sequence: list[str | None], last: int, repeated: int, nested: bool
    ) -> tuple[int, int]:
        """Rewrites the last symbol as handle_repetitions of llama-grammar.cpp does -> (end, rules in it now)."""
        begin, c = at, self.char(at)
        at += 1
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(c, (0, 0))
        if c == "{":
            at = self.space(at, nested)
            end = self.run(at, DIGITS, "a number")
            least = most = self.number(at, end)
            at = self.space(end, nested)
            if self.char(at) == ",":
                at, most = self.space(at + 1, nested), None
                if self.char(at) in DIGITS:
                    end = self.run(at, DIGITS, "a number")
                    most = self.number(at, end)
                    at = self.space(end, nested)
            if self.char(at) != "}":
                raise self.error("} is expected", at)
            at += 1
            if least > MAX_REPETITIONS:
                raise self.error(f"more than {MAX_REPETITIONS} repetitions", begin)
            if most is not None and most < least:
                raise self.error(f"at most {most} and at least {least} repetitions", begin)
            if most is not None and most > MAX_REPETITIONS:
                most = None
        symbol = sequence[last:]
        if not symbol:
            raise self.error(f"nothing comes before {c}", begin)
        repeated *= most or least or 1
        if repeated > MAX_REPETITIONS:
            raise self.error(
                f"more than {MAX_REPETITIONS} rules are repeated, counted with those in parentheses", begin
            )
        n_optional = 1 if most is None else most - least
        self.count(len(symbol) * (max(least - 1, 0) + n_optional) + n_optional, begin)
        if least == 0:
            del sequence[last:]
        else:
            sequence.extend(symbol * (least - 1))
        previous: str | None = None
        for _ in range(n_optional):
            optional = self.new_name(name)
            follows = optional if most is None else previous
            self.rules[optional] = [[*symbol, follows] if follows else list(symbol), []]
            previous = optional
        if previous:
            sequence.append(previous)
        return at, repeated

    def n_symbols(self) -> int:
        return len(self.names) + self.n_names

    def number(self, at: int, end: int) -> int:
        return int(self.text[at:end][:9]) if end - at < 10 else 10**9

    def count(self, n: int, at: int) -> None:
        self.n_elements += n
        if self.n_elements > MAX_ELEMENTS:
            raise self.error(f"the repetitions make it longer than {MAX_ELEMENTS} characters", at)


def _check_beginnings(rules: dict[str, Rule]) -> None:
    """Refuse left recursion, which llama.cpp finds by walking it, and rules that can begin in too many ways.

    llama.cpp takes a rule for one that may be empty if one of its alternatives is written so. Others may be empty too,
    by being made of such rules: a recursion through those it does not find, and never ends where something follows.
    """
    written_empty = {name for name, rule in rules.items() if [] in rule}
    may_be_empty = _may_be_empty(rules)

    def beginnings(name: str, empty: set[str], tails: bool) -> list[str]:
        """The rules that a rule can begin with; without tails those only that something follows."""
        found = []
        for alternative in rules[name]:
            for i, symbol in enumerate(alternative):
                if symbol is None:
                    break
                if tails or i + 1 < len(alternative):
                    found.append(symbol)
                if symbol not in empty:
                    break
        return found

    cost, depth = _walk({name: beginnings(name, written_empty, True) for name in rules})
    if max(depth.values()) > MAX_DEPTH:
        raise ConfigError(f"the grammar cannot be used: more than {MAX_DEPTH} of its rules begin with one another")
    every = {name: beginnings(name, may_be_empty, True) for name in rules}
    for component in _components(every):
        members = set(component)
        for name in component:
            if not members.isdisjoint(beginnings(name, may_be_empty, False)):
                raise _left_recursion(name)
        outside = sum(cost[name] for member in component for name in every[member] if name not in members)
        for name in component:
            cost[name] = max(cost[name], len(component) + outside)
    name = max(cost, key=lambda name: cost[name])
    if cost[name] > MAX_BEGINNINGS:
        raise ConfigError(
            f"the grammar cannot be used: its rule {name.split('_')[0]} can begin in more than {MAX_BEGINNINGS} ways: "
            "let fewer of its alternatives begin with the same rules"
        )


def _may_be_empty(rules: dict[str, Rule]) -> set[str]:
    users: dict[str, set[str]] = {}
    for name, rule in rules.items():
        for alternative in rule:
            for symbol in alternative:
                if symbol is not None:
                    users.setdefault(symbol, set()).add(name)
    found: set[str] = set()
    look = list(rules)
    while look:
        name = look.pop()
        if name not in found and any(all(symbol in found for symbol in alternative) for alternative in rules[name]):
            found.add(name)
            look.extend(users.get(name, ()))
    return found


def _left_recursion(name: str) -> ConfigError:
    return ConfigError(f"the grammar cannot be used: its rule {name.split('_')[0]} begins with itself (left recursion)")


def _walk(graph: dict[str, list[str]]) -> tuple[dict[str, int], dict[str, int]]:
    """What walking a graph without cycles costs from each node, every path on its own, and how deep it goes."""
    cost: dict[str, int] = {}
    depth: dict[str, int] = {}
    open_nodes: set[str] = set()
    for start in graph:
        if start in cost:
            continue
        stack = [(start, iter(graph[start]))]
        open_nodes.add(start)
        while stack:
            node, rest = stack[-1]
            for following in rest:
                if following in cost:
                    continue
                if following in open_nodes:
                    raise _left_recursion(following)
                open_nodes.add(following)
                stack.append((following, iter(graph[following])))
                break
            else:
                cost[node] = 1 + sum(cost[following] for following in graph[node])
                depth[node] = 1 + max((depth[following] for following in graph[node]), default=0)
                open_nodes.discard(node)
                stack.pop()
    return cost, depth


def _components(graph: dict[str, list[str]]) -> list[list[str]]:
    """Strongly connected components, by Tarjan's algorithm without recursion."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    on_path: set[str] = set()
    found: list[list[str]] = []
    for start in graph:
        if start in index:
            continue
        stack = [(start, iter(graph[start]))]
        index[start] = low[start] = len(index)
        path.append(start)
        on_path.add(start)
        while stack:
            node, rest = stack[-1]
            for following in rest:
                if following not in index:
                    index[following] = low[following] = len(index)
                    path.append(following)
                    on_path.add(following)
                    stack.append((following, iter(graph[following])))
                    break
                if following in on_path:
                    low[node] = min(low[node], index[following])
            else:
                stack.pop()
                if stack:
                    low[stack[-1][0]] = min(low[stack[-1][0]], low[node])
                if low[node] == index[node]:
                    component = []
                    while True:
                        member = path.pop()
                        on_path.discard(member)
                        component.append(member)
                        if member == node:
                            break
                    found.append(component)
    return found

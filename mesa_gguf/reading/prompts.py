"""The prompt of a question about a document, as token ids: a head with the document, then a tail with the question.

Both are made of pieces that are tokenized apart, so that a head does not depend on the question, and a text from outside that
spells a control token, such as ``<|im_end|>``, stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import llama_cpp
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..errors import ModelError, PromptError, Remedy
from ..llama import MesaLlama
from ..vocabulary import tokenize_piece
from .text import check_text

TASK = "Answer the question that follows this text.\n\n"  # first, so that it lies in the first chunk, which every chunk reads
END = "\n\n"  # of a document
QUESTION = "Question: {question}"
# for models that are talked to: the document is a message, this the reply, the question another message. Small models go on with the
# text, or say the task again, where a message has both (experiments/SETTINGS.md)
REPLY = "I have read the text. What is your question about it?"
ABOUT = "Question about the text: {question}"
ANSWER = "\nAnswer:"

# what stands for the texts from outside while the chat template is rendered; nobody writes that, and no template changes it
_FIRST, _REPLY, _SECOND = "\ue000mesa-first\ue001", "\ue000mesa-reply\ue001", "\ue000mesa-second\ue001"
_MARK = "\ue000mesa-{}\ue001"


def gap_after(text: str) -> str:
    """What stands between a document's last chunk and the question, so that the document ends as `PromptForm.head` ends it."""
    return "" if text.endswith(END) else END[1:] if text.endswith("\n") else END


@dataclass(frozen=True)
class Turn:
    """A question of a conversation and its answer.

    Attributes:
        answer: may be empty, where none was given.
    """

    question: str
    answer: str


class PromptForm:
    """How documents and questions become prompts for a model.

    With a chat template, the document is one message of the user and the question another; between them the model says
    that it has read the text. Without one, or with plain=True, they follow each other, then comes ``Answer:``, and the model
    goes on with a line. Earlier turns of a conversation, and the caller's instructions, stand behind the documents: what lies
    before those is the same for every question.

    Args:
        vocabulary: the model; its weights are not needed (`load_vocabulary`).
        plain: do not use the model's chat template.

    Attributes:
        vocabulary: the model.
        stop: strings that end an answer, besides the model's own end of generation.
        n_before: tokens of a tail before what is said of the question.

    Raises:
        ModelError: the model's chat template cannot be rendered.
    """

    def __init__(self, vocabulary: MesaLlama, *, plain: bool = False) -> None:
        self.vocabulary = vocabulary
        template = vocabulary.metadata.get("tokenizer.chat_template")
        self._template = None if plain or template is None else _Template(vocabulary, template)
        self.stop: tuple[str, ...] = ("\n",) if self.is_plain else ()
        self.n_before = 0
        if self._template is not None:
            before, behind, _ = self._template.around(1)
            self.n_before = len(before) + len(self.tokenize(REPLY)) + len(behind)

    @property
    def is_plain(self) -> bool:
        """The model's chat template is not used: it has none, or was told so."""
        return self._template is None

    @property
    def name(self) -> str:
        """Which form it is."""
        return "plain" if self.is_plain else "chat"

    @property
    def preamble(self) -> list[int]:
        """The tokens of the prompt up to the document: the beginning of the user's message, and the task.

        It is the first chunk of every text that is put together from kept chunks, so it is never empty.
        """
        if self._template is not None:
            return [*self._template.head, *self.tokenize(TASK)]
        return begin(self.vocabulary) or self.tokenize(TASK)

    def head(self, document: str) -> list[int]:
        """The tokens of the prompt up to the end of the document.

        Raises:
            PromptError: the document is empty, or not text.
        """
        text = check_text(document, "the document")
        before = begin(self.vocabulary) if self.is_plain else self.preamble
        return [*before, *self.tokenize(f"{text}{END}")]

    def tail(
        self, question: str, *, begun: str = "", history: Sequence[Turn] = (), instructions: str | None = None
    ) -> list[int]:
        """The tokens of the prompt after the document.

        Args:
            begun: what the answer begins with.
            history: questions that were asked before, and their answers; the first one follows the document.
            instructions: how to answer; they stand before the first question.

        Raises:
            PromptError: the question is empty, or a text is not text.
            ModelError: the model's chat template cannot be rendered with so many turns.
        """
        turns = [_check_turn(turn, f"history[{n}]") for n, turn in enumerate(history)]
        asked = check_text(question, "the question")
        questions = [turn.question for turn in turns] + [asked]
        questions[0] = (QUESTION if self.is_plain else ABOUT).format(question=questions[0])
        if instructions is not None:
            questions[0] = f"{check_text(instructions, 'instructions')}{END}{questions[0]}"
        tokens: list[int] = []
        if self._template is None:
            for n, turn in enumerate(turns):
                answer = f" {turn.answer}" if turn.answer else ""
                tokens += self.tokenize(f"{questions[n]}{ANSWER}") + self.tokenize(answer)
                questions[n + 1] = f"\n{QUESTION.format(question=questions[n + 1])}"
            return tokens + self.tokenize(f"{questions[-1]}{ANSWER}{begun}")
        texts = [REPLY]
        for question, turn in zip(questions, turns, strict=False):
            texts += [question, turn.answer]
        *around, end = self._template.around(1 + len(turns))
        for before, text in zip(around, [*texts, questions[-1]], strict=True):
            tokens += before + self.tokenize(text)
        return [*tokens, *end, *self.tokenize(begun)]

    def follow_up(self, question: str, answer: str) -> list[int]:
        """The tokens of a further question, after those of an answer that stays in the context.

        Args:
            answer: the text of that answer as the model wrote it.
        """
        asked = check_text(question, "the question")
        if self._template is None:
            new_line = "" if answer.endswith("\n") else "\n"
            return self.tokenize(f"{new_line}{QUESTION.format(question=asked)}{ANSWER}")
        return [*self._template.between, *self.tokenize(asked), *self._template.tail]

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text from outside: no control token among them."""
        return tokenize_piece(self.vocabulary, text)


class _Template:
    """A chat template, rendered once: the tokens of what stands around the texts of a conversation.

    Attributes:
        head: before the user's first message.
        tail: between a message of the user and the answer, where it is the only one.
        between: between an answer and the user's next message.
    """

    def __init__(self, vocabulary: MesaLlama, template: str) -> None:
        def text_of(token: int) -> str:
            return vocabulary._model.token_get_text(token) if token != llama_cpp.LLAMA_TOKEN_NULL else ""

        bos, eos = text_of(vocabulary.token_bos()), text_of(vocabulary.token_eos())
        self._vocabulary = vocabulary
        try:
            self._formatter = Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)
        except (TemplateError, ValueError, TypeError, AttributeError, KeyError) as err:
            raise _unusable(f"it cannot be rendered: {err}") from None
        once = self._render([("user", _FIRST)])
        twice = self._render([("user", _FIRST), ("assistant", _REPLY), ("user", _SECOND)])

        head, tail = _split(once, _FIRST)
        rest = _split(_split(twice, _FIRST)[1], _REPLY)[1]
        given = [] if bos and head.startswith(bos) else begin(vocabulary)
        self.head = [*given, *tokenize_piece(vocabulary, head, special=True)]
        self.tail = tokenize_piece(vocabulary, tail, special=True)
        self.between = tokenize_piece(vocabulary, _split(rest, _SECOND)[0], special=True)
        self._around: list[list[int]] = []  # of the conversation that was asked for last

    def _render(self, messages: Sequence[tuple[str, str]]) -> str:
        try:
            prompt: str = self._formatter(
                messages=[{"role": role, "content": content} for role, content in messages]  # type: ignore[misc]
            ).prompt
        except (TemplateError, ValueError, TypeError, AttributeError, KeyError) as err:
            raise _unusable(f"it cannot be rendered: {err}") from None
        return prompt

    def around(self, n_turns: int) -> list[list[int]]:
        """The tokens behind each message of a conversation: question and answer of each turn, then the question.

        note: rendered as it is, because templates may treat the last messages otherwise than those before.
        """
        if len(self._around) != 2 * n_turns + 1:
            marks = [_MARK.format(n) for n in range(2 * n_turns + 1)]
            rest = self._render([(("user", "assistant")[n % 2], mark) for n, mark in enumerate(marks)])
            texts = []
            for mark in marks:
                before, rest = _split(rest, mark)
                texts.append(before)
            self._around = [tokenize_piece(self._vocabulary, text, special=True) for text in (*texts[1:], rest)]
        return self._around


def _check_turn(turn: object, name: str) -> Turn:
    """A turn without white space around its texts.

    Raises:
        PromptError: it is none, or has no question.
    """
    if not isinstance(turn, Turn):
        raise PromptError(f"{name} is of the type {type(turn).__name__}: it must be a Turn, with question and answer")
    answer = turn.answer
    if answer != "":
        answer = "" if isinstance(answer, str) and not answer.strip() else check_text(answer, f"{name}.answer")
    return Turn(check_text(turn.question, f"{name}.question"), answer)


def _split(text: str, mark: str) -> Sequence[str]:
    parts = text.split(mark)
    if len(parts) != 2:
        raise _unusable(f"it gives a message {len(parts) - 1} times")
    return parts


def _unusable(reason: str) -> ModelError:
    return ModelError(
        f"the model's chat template cannot be used ({reason})", Remedy("plain", True, why="which does without it")
    )


def begin(vocabulary: MesaLlama) -> list[int]:
    """The token that begins a text, for the models that want one."""
    return [vocabulary.token_bos()] if vocabulary._model.add_bos_token() else []

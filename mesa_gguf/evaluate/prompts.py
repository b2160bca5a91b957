"""From a sample to token ids: the prompt's form, and documents of just the length that fills it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .. import ask, documents
from ..errors import ConfigError
from .tasks import Brief, Sample, Style, Task

BUNDLED_NAME = "mesa-reader"  # its general.name
SLACK = 48  # tokens that a prompt may be shorter than asked; filler comes in whole sentences
MAX_TRIES = 12


class Prompter:
    """Makes prompts for a model, whose weights are not needed.

    Args:
        style: "auto" is "reader" for the bundled model, else "natural".
    """

    def __init__(self, path: Path, style: Style | None = None) -> None:
        self.vocabulary = ask.load_vocabulary(path)
        bundled = self.vocabulary.metadata.get("general.name") == BUNDLED_NAME
        self.style: Style = style if style is not None else "reader" if bundled else "natural"
        self.plain = self.style == "reader" or "tokenizer.chat_template" not in self.vocabulary.metadata

    def tokenize(self, text: str) -> list[int]:
        return self.vocabulary.tokenize(text.encode(), add_bos=False, special=False)

    def begin(self) -> list[int]:
        """The token that begins a text, for the models that want one."""
        return [self.vocabulary.token_bos()] if self.vocabulary._model.add_bos_token() else []

    def count(self, text: str) -> int:
        return len(self.tokenize(text))

    @property
    def stop(self) -> str:
        """What ends an answer, besides the model's own end of generation."""
        return "\n" if self.style == "reader" else "\nQuestion:"

    def prompts(self, sample: Sample) -> ask.Prompts:
        """The document, and what follows it for the first turn of each item."""
        first = [item.turns[0] for item in sample.items]
        if not self.plain:
            return ask.make_prompts(self.vocabulary, sample.document, [turn.question for turn in first])
        prompts = [
            self.begin() + self.tokenize(documents.prompt(sample.document, turn.question) + turn.prefix)
            for turn in first
        ]
        # with a question that nobody asks, an answer does not depend on which other questions are asked
        n_document = ask._n_common([*prompts, self.begin() + self.tokenize(documents.prompt(sample.document, ""))])
        return ask.Prompts(prompts[0][:n_document], [prompt[n_document:] for prompt in prompts], one_line=False)

    def next_turn(self, question: str, *, new_line: bool) -> list[int]:
        """A question that follows an answer in the same context, in the form without a chat template."""
        return self.tokenize(("\n" if new_line else "") + documents.QUESTION.format(question=question))

    def n_tokens(self, sample: Sample, prompts: ask.Prompts, max_tokens: int) -> int:
        """Tokens of the longest item, the room for its answers included."""
        later = [
            sum(len(self.next_turn(turn.question, new_line=True)) + max_tokens for turn in item.turns[1:])
            for item in sample.items
        ]
        longest = max(len(question) + more for question, more in zip(prompts.questions, later))
        return len(prompts.document) + longest + max_tokens

    def fit(self, task: Task, length: int, make_brief: Callable[[int], Brief]) -> tuple[Sample, ask.Prompts]:
        """A sample whose prompt and answers have `length` tokens, or a few less.

        Args:
            make_brief: the brief of a document of n tokens.

        Raises:
            ConfigError: the length is too short for the task.
        """
        room = task.answer_room(self.style)
        budget = length - room
        for _ in range(MAX_TRIES):
            if budget < 1:
                break
            try:
                sample = task.make(make_brief(budget))
            except ValueError as err:
                raise ConfigError(f"{task.name} at {length} tokens: {err}") from None
            prompts = self.prompts(sample)
            over = self.n_tokens(sample, prompts, room) - length
            if -SLACK <= over <= 0:
                return sample, prompts
            budget -= over + SLACK // 8
        raise ConfigError(f"a length of {length} tokens does not suit the task {task.name}: make it longer")

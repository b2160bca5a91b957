"""From a sample to token ids: the prompt's form, and documents of just the length that fills it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from ...reading.prompts import PromptForm, begin
from ...reading.reader import load_vocabulary
from .tasks import Brief, Sample, Style, Task, Turn

BUNDLED_NAME = "mesa-reader"  # its general.name
SLACK = 48  # tokens that a prompt may be shorter than asked; filler comes in whole sentences
SHORTER = 16  # a share of the length that lists of words may be shorter, where they grow in jumps
MAX_TRIES = 12


@dataclass(frozen=True)
class Prompts:
    """The prompts of a sample as token ids: item i is asked with ``head + tails[i]``."""

    head: list[int]
    tails: list[list[int]]


class Prompter:
    """Makes prompts for a model, whose weights are not needed.

    Args:
        style: "auto" is "reader" for the bundled model, else "natural".
    """

    def __init__(self, path: Path, style: Style | None = None) -> None:
        self.vocabulary = load_vocabulary(path)
        bundled = self.vocabulary.metadata.get("general.name") == BUNDLED_NAME
        self.style: Style = style if style is not None else "reader" if bundled else "natural"
        self.form = PromptForm(self.vocabulary, plain=self.style == "reader")

    def tokenize(self, text: str) -> list[int]:
        return self.form.tokenize(text)

    def begin(self) -> list[int]:
        """The token that begins a text, for the models that want one."""
        return begin(self.vocabulary)

    def count(self, text: str) -> int:
        return len(self.tokenize(text))

    @property
    def stop(self) -> str:
        """What ends an answer, besides the model's own end of generation."""
        return "\n" if self.style == "reader" else "\nQuestion:"

    def prompts(self, sample: Sample) -> Prompts:
        """The document, and what follows it for the first turn of each item."""
        return Prompts(self.form.head(sample.document), [self.tail(item.turns[0]) for item in sample.items])

    def tail(self, turn: Turn) -> list[int]:
        """What follows a document, for a turn."""
        return self.form.tail(turn.question, begun=turn.prefix if self.form.is_plain else "")

    def n_tokens(self, sample: Sample, prompts: Prompts, max_tokens: int) -> int:
        """Tokens of the longest item, the room for its answers included."""
        later = [
            sum(len(self.form.follow_up(turn.question, "")) + max_tokens for turn in item.turns[1:])
            for item in sample.items
        ]
        longest = max(len(question) + more for question, more in zip(prompts.tails, later))
        return len(prompts.head) + longest + max_tokens

    def fit(self, task: Task, length: int, make_brief: Callable[[int], Brief]) -> tuple[Sample, Prompts]:
        """A sample whose prompt and answers have `length` tokens, or a few less; lists of words up to 1/16 less.

        Args:
            make_brief: the brief of a document of n tokens.

        Raises:
            ConfigError: the length is too short for the task.
        """
        room = task.answer_room(self.style)
        budget = length - room
        fits, too_long = 0, 2 * length  # budgets: the largest of a prompt that fits, and the least of one that does not
        best: tuple[int, Sample, Prompts] | None = None
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
            if over > 0:
                too_long = min(too_long, budget)
            else:
                fits = max(fits, budget)
                if best is None or over > best[0]:
                    best = over, sample, prompts
            budget -= over + SLACK // 8
            if best is not None and not fits < budget < too_long:  # texts of lists grow in jumps
                budget = (fits + too_long) // 2
        if best is not None and -best[0] <= length // SHORTER:
            return best[1:]
        raise ConfigError(f"a length of {length} tokens does not suit the task {task.name}: make it longer")

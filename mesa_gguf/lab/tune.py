"""The few numbers that matter, measured on a model: the reading length R, the bias of the stair, and the length that queries are scaled from.

A text with facts in it is read up to some lengths, and the facts are asked for. What counts is the log-probability of the answers, begun with the
facts' own words: by far fewer questions than right and wrong would take, as each is compared with itself.

    >>> outcome = Tuner(path, default_text()).run()
    >>> outcome.tuning

What is read costs most, so everything is read once: in one piece as far as T allows, and in chunks. A chunk's keys and values depend on none of the
numbers, which say where it stands when a question is asked. So for each set of numbers the chunks are put together anew, and only the questions read.
"""

from __future__ import annotations

import math
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from .. import _core
from ..config import MesaConfig
from ..errors import ConfigError, OutOfMemoryError, PromptError
from ..library.chunking import split
from ..llama import MesaLlama
from ..model.header import check_model
from ..model.tuning import Tuning
from ..reading.prompts import PromptForm
from ..reading.reader import context_for, load_model, load_vocabulary
from .evaluate.loss import score_begun
from .facts import FactDocument, Haystack, Question, make_document

CHUNK = 928  # tokens; two, four, … of them fit into 2,048, 4,096, … tokens beside a question
POINTS = (2, 4, 8, 16)  # chunks after which questions are asked
LONGEST = POINTS[-1] * CHUNK
LEAST_LENGTH = 2048  # that is tried as R
N_FACTS = 64  # in a document of the longest length: at the first one there are as many questions as are asked
N_QUESTIONS = 16  # asked at each length
ROOM = 128  # tokens of a question and its answer
FLOOR = -8.0  # of a log-probability: worse is wrong all the same
GROWTH = 2.6  # a length takes so much longer than the one before
MAX_ROUNDS = 8
SURE = 2.0  # standard errors that numbers must be better by than the defaults
LEAST_GAIN = 0.02  # nats

Watch = Callable[[str, float], None]
"""Called with what is done now, and the share of the time that has passed."""


@dataclass(frozen=True)
class Numbers:
    """What is tried."""

    reading_length: int
    stair_bias: float
    log_length: int

    def __str__(self) -> str:
        return f"R {self.reading_length}, bias {self.stair_bias:g}, log-n from {self.log_length}"


@dataclass(frozen=True)
class Row:
    """A set of numbers, as the table has it.

    Attributes:
        means: of the log-probability, at each length; None: not measured.
        gain: over the defaults, and its
        error: standard error.
    """

    numbers: Numbers
    means: tuple[float | None, ...]
    gain: float
    error: float
    items: int


@dataclass(frozen=True)
class Outcome:
    """What was found.

    Attributes:
        lengths: in tokens, at which was asked.
        rows: the defaults first.
        best: of the rows; the defaults, unless others are surely better.
        chunk: C that goes with it.
        too_long: tokens of the shortest length that there was no time for; 0: none was left out for that.
        seconds_whole, seconds_chunks: that the longest text that was read both ways took.
        tuning: to be kept; None where the defaults are best.
    """

    lengths: tuple[int, ...]
    rows: tuple[Row, ...]
    best: Row
    chunk: int
    seconds_whole: float
    seconds_chunks: float
    n_whole: int
    rounds: int
    seconds: float
    tuning: Tuning | None
    too_long: int

    def table(self) -> Iterator[tuple[str, ...]]:
        """The rows in words, a head first."""
        yield ("R", "bias", "log-n from", *(f"{n}" for n in self.lengths), "gain", "")
        for row in self.rows:
            is_default, numbers = row is self.rows[0], row.numbers
            marks = [name for name, marked in (("default", is_default), ("best", row is self.best)) if marked]
            yield (
                str(numbers.reading_length),
                f"{numbers.stair_bias:g}",
                str(numbers.log_length),
                *("–" if mean is None else f"{mean:.2f}" for mean in row.means),
                "" if is_default else f"{row.gain:+.2f} ± {row.error:.2f}",
                ", ".join(marks),
            )


@dataclass
class _Text:
    """A document, and what was read of it so far."""

    document: FactDocument
    stops: list[int]  # characters up to the end of each chunk
    chunks: list[list[int]]
    rows: list[bytes] = field(default_factory=list)
    whole: bytes = b""  # rows of the beginning, read in one piece
    n_whole: int = 0  # and its tokens
    seconds_chunks: float = 0.0
    seconds_whole: float = 0.0


class Tuner:
    """Measures a model.

    Args:
        text: that facts are hidden in.
        minutes: that it may take, about; one round is always made, of two lengths at least.
        plain: the model's chat template is not used.

    Raises:
        ModelError, OutOfMemoryError: as `MesaLlama` does.
        PromptError: the text is too short.
    """

    def __init__(
        self, path: Path, text: str, *, seed: int = 0, minutes: float = 10.0, n_threads: int | None = None, plain: bool = False,
        n_questions: int | None = None,
    ) -> None:  # fmt: skip
        self.path, self.seed, self.seconds = path, seed, 60 * minutes
        self.n_questions = n_questions or N_QUESTIONS
        self.haystack = Haystack(text)
        self.train_length = check_model(path).train_length
        self.form = PromptForm(load_vocabulary(path), plain=plain)
        self.preamble = self.form.preamble
        room = min(CHUNK, self.train_length - len(self.preamble) - ROOM)
        if room < 2 * ROOM:
            raise ConfigError(
                f"a model that was trained at {self.train_length} tokens has no room for chunks: there is nothing to tune"
            )
        self.n_chunk = room
        auto = _core.Params.default(self.train_length)
        self.auto = Numbers(auto.reading_length, round(auto.stair_bias, 6), auto.log_length)
        self.points: tuple[int, ...] = POINTS
        self.n_threads = n_threads
        self.scores: dict[tuple[Numbers | None, int], dict[str, float]] = {}
        self.lengths: dict[int, int] = {}
        self.too_long = 0

    #
    # what is tried
    #

    def reading_lengths(self) -> list[int]:
        """Of R: powers of two, as far as the longest text can tell them apart, and the default."""
        longest = min(self.train_length, len(self.preamble) + self.points[-1] * self.n_chunk)
        lengths = [LEAST_LENGTH << n for n in range(16) if LEAST_LENGTH << n < longest]
        return sorted({*lengths, self.auto.reading_length, self.train_length})

    def first_candidates(self) -> list[Numbers]:
        """Each R with the default's other numbers, and with the paper's."""
        out = [self.auto]
        for length in self.reading_lengths():
            out += [Numbers(length, self.auto.stair_bias, 4 * length), Numbers(length, 0.0, length)]
        return list(dict.fromkeys(out))

    def more_candidates(self, best: Numbers) -> list[Numbers]:
        """What stands between them, at the best R."""
        length = best.reading_length
        return [Numbers(length, 0.0, 4 * length), Numbers(length, self.auto.stair_bias, length)]

    def config(self, numbers: Numbers) -> MesaConfig:
        return MesaConfig(
            reading_length=numbers.reading_length,
            stair_bias=numbers.stair_bias,
            log_length=numbers.log_length,
            sentence_borders=False,
            tuned=False,
        )

    #
    # the work
    #

    def run(self, watch: Watch | None = None) -> Outcome:
        """Measure, for as long as there is time."""
        self._begin = time.monotonic()
        self._watch = watch
        llm = self._open()
        with closing(llm):
            rounds, longest_round = 0, 0.0
            while rounds < MAX_ROUNDS:
                begin = time.monotonic()
                if rounds and begin - self._begin + longest_round > self.seconds:
                    break
                text = self._round(llm, rounds)
                rounds += 1
                longest_round = max(longest_round, time.monotonic() - begin)
        return self._outcome(rounds, text)

    def _open(self) -> MesaLlama:
        """The model with a context for the longest text, or the longest that there is memory for."""
        for n in range(len(POINTS), 1, -1):
            self.points = POINTS[:n]
            n_tokens = len(self.preamble) + self.points[-1] * self.n_chunk
            try:
                return load_model(
                    self.path, mesa=MesaConfig(tuned=False), n_ctx=context_for(n_tokens, 2 * ROOM),
                    n_threads=self.n_threads, n_threads_batch=self.n_threads, swa_full=True,
                )  # fmt: skip
            except OutOfMemoryError:
                if n == 2:
                    raise
        raise AssertionError

    def _round(self, llm: MesaLlama, nth: int) -> _Text:
        """Everything, on a document of its own."""
        text = self._text(nth)
        taken = 0.0
        for i, point in enumerate(self.points):
            begin = time.monotonic()
            if i >= 2 and nth == 0 and begin - self._begin + GROWTH * taken > self.seconds:
                self.points, self.too_long = self.points[:i], self._n_tokens(text, point)
                break
            n = self.lengths[point] = max(self.lengths.get(point, 0), self._n_tokens(text, point))
            asked = self._asked(text, point, nth)
            if self._fits(point, self.train_length):
                self._say(nth, n, "in one piece")
                self._read_whole(llm, text, point)
                self._ask(llm, None, point, asked)
            self._say(nth, n, "in chunks")
            self._read_chunks(llm, text, point)
            for numbers in self.first_candidates():
                if not self._fits(point, numbers.reading_length):
                    self._say(nth, n, str(numbers))
                    self._put_together(llm, text, point, numbers)
                    self._ask(llm, numbers, point, asked)
            taken = time.monotonic() - begin
        self._ask_more(llm, text, nth)
        return text

    def _ask_more(self, llm: MesaLlama, text: _Text, nth: int) -> None:
        """The candidates beside the best ones, on what was read already."""
        best = max(self._rows(self.first_candidates()), key=lambda row: row.gain)
        for point in self.points:
            asked = self._asked(text, point, nth)
            for numbers in self.more_candidates(best.numbers):
                if not self._fits(point, numbers.reading_length):
                    self._say(nth, self.lengths[point], str(numbers))
                    self._put_together(llm, text, point, numbers)
                    self._ask(llm, numbers, point, asked)

    def _say(self, nth: int, n_tokens: int, what: str) -> None:
        if self._watch is not None:
            self._watch(
                f"text {nth + 1}, {n_tokens} tokens: {what}", min(1.0, (time.monotonic() - self._begin) / self.seconds)
            )

    def _text(self, nth: int) -> _Text:
        def count(text: str) -> int:
            return len(self.form.tokenize(text))

        while True:
            n_tokens = self.points[-1] * self.n_chunk
            n_facts = max(8, N_FACTS * n_tokens // LONGEST)
            try:
                document = make_document(
                    self.haystack, f"tune:{self.seed}:{nth}", n_tokens, count,
                    n_unlike=n_facts * 5 // 8, n_alike=n_facts * 3 // 8, n_links=0, n_counts=0, n_absent=0,
                )  # fmt: skip
                break
            except PromptError:
                if nth or len(self.points) <= 2:
                    raise
                self.points = self.points[:-1]
        spans = split(document.text, [], count, max_tokens=self.n_chunk, min_tokens=self.n_chunk * 3 // 4)
        chunks = [self.form.tokenize(document.text[span.start : span.stop]) for span in spans]
        return _Text(document, [span.stop for span in spans], chunks)

    def _fits(self, point: int, length: int) -> bool:
        """Whether what is asked at a point is read in one piece with that R."""
        return len(self.preamble) + point * self.n_chunk + ROOM <= length

    def _n_tokens(self, text: _Text, point: int) -> int:
        return len(self.preamble) + sum(len(chunk) for chunk in text.chunks[:point])

    def _asked(self, text: _Text, point: int, nth: int) -> list[tuple[str, Question]]:
        """Questions for facts that lie before a point, spread over the text, with their names."""
        stop = text.stops[min(point, len(text.stops)) - 1]
        n_facts = bisect_right([fact.stop for fact in text.document.facts], stop)
        there = [q for q in text.document.questions if q.facts[0] < n_facts]
        rng = random.Random(f"{self.seed}:{nth}:{point}")
        chosen = rng.sample(there, min(self.n_questions, len(there)))
        return [(f"{nth}:{point}:{q.kind}:{q.form}:{q.facts[0]}", q) for q in chosen]

    def _read_whole(self, llm: MesaLlama, text: _Text, point: int) -> None:
        """Bring the text up to a point into the context, in one piece; what was read of it is not read again."""
        tokens = [*self.preamble, *(token for chunk in text.chunks[:point] for token in chunk)]
        llm.reconfigure(self.config(Numbers(self.train_length, 0.0, self._unscaled)))
        if text.n_whole:
            llm.load_chunk(tokens[: text.n_whole], text.whole)
        begin = time.monotonic()
        llm.eval(tokens[text.n_whole :])
        text.seconds_whole += time.monotonic() - begin
        text.whole, text.n_whole = llm.save_chunk(0, len(tokens)), len(tokens)

    @property
    def _unscaled(self) -> int:
        return 4 * self.train_length

    def _read_chunks(self, llm: MesaLlama, text: _Text, point: int) -> None:
        """Read the chunks up to a point that were not read yet, each behind the preamble alone."""
        llm.reconfigure(self.config(Numbers(self.train_length, 0.0, self._unscaled)))
        begin = time.monotonic()
        if not text.rows:
            llm.eval(self.preamble)
            text.rows.append(llm.save_chunk(0, len(self.preamble)))
        else:
            llm.load_chunk(self.preamble, text.rows[0])
        n = len(self.preamble)
        for chunk in text.chunks[len(text.rows) - 1 : point]:
            llm.n_tokens = n
            llm.eval(chunk)
            text.rows.append(llm.save_chunk(n, n + len(chunk)))
        text.seconds_chunks += time.monotonic() - begin

    def _put_together(self, llm: MesaLlama, text: _Text, point: int, numbers: Numbers) -> None:
        llm.reconfigure(self.config(numbers))
        for chunk, rows in zip([self.preamble, *text.chunks[:point]], text.rows):
            llm.load_chunk(chunk, rows)

    def _ask(self, llm: MesaLlama, numbers: Numbers | None, point: int, asked: Sequence[tuple[str, Question]]) -> None:
        """Score the answers behind what is in the context."""
        n = llm.n_tokens
        scores = self.scores.setdefault((numbers, point), {})
        gap = " " if self.form.is_plain else ""
        for name, question in asked:
            before = [*self.form.tail(question.text), *self.form.tokenize(f"{gap}{question.begun}")]
            answer = self.form.tokenize(f" {question.answer}")
            scores[name] = max(FLOOR, score_begun(llm, n, before, answer).logprob)
        llm.n_tokens = n

    #
    # what comes of it
    #

    def _cell(self, numbers: Numbers, point: int) -> dict[str, float]:
        """The scores of a set of numbers at a length: up to R those of reading in one piece, whatever the other numbers are."""
        return self.scores.get((None if self._fits(point, numbers.reading_length) else numbers, point), {})

    def _is_default(self, numbers: Numbers) -> bool:
        """Whether nothing that was measured tells the numbers from the defaults."""
        lengths = (numbers.reading_length, self.auto.reading_length)
        return all(self._fits(point, length) for point in self.points for length in lengths)

    def _rows(self, candidates: Sequence[Numbers]) -> list[Row]:
        return [row for row in (self._row(numbers) for numbers in dict.fromkeys(candidates)) if row is not None]

    def _row(self, numbers: Numbers) -> Row | None:
        """Compared item by item with the defaults; each length counts as much as any other. None: it was not measured everywhere."""
        means: list[float | None] = []
        gains, variances, n_items = [], [], 0
        for point in self.points:
            own, other = self._cell(numbers, point), self._cell(self.auto, point)
            common = own.keys() & other.keys()
            means.append(math.fsum(own.values()) / len(own) if own else None)
            if not common:
                return None
            changes = [own[name] - other[name] for name in common]
            mean = math.fsum(changes) / len(changes)
            gains.append(mean)
            variances.append(math.fsum((c - mean) ** 2 for c in changes) / max(1, len(changes) - 1) / len(changes))
            n_items += len(common)
        n = len(gains)
        return Row(numbers, tuple(means), math.fsum(gains) / n, math.sqrt(math.fsum(variances)) / n, n_items)

    def _outcome(self, rounds: int, text: _Text) -> Outcome:
        tried = dict.fromkeys([self.auto, *(numbers for numbers, _ in self.scores if numbers is not None)])
        tried |= dict.fromkeys(numbers for numbers in self.first_candidates() if not self._is_default(numbers))
        rows = self._rows(list(tried))
        default, *others = rows
        others.sort(key=lambda row: -row.gain)
        sure = [row for row in others if row.gain >= max(LEAST_GAIN, SURE * row.error)]
        best = sure[0] if sure else default
        params = self.config(best.numbers).params(self.train_length)
        tuning = None
        if best is not default:
            tuning = Tuning(
                **vars(best.numbers), chunk=params.chunk, model=self.path.name, date=time.strftime("%Y-%m-%d"),
                items=best.items, gain=round(best.gain, 4),
            )  # fmt: skip
        return Outcome(
            lengths=tuple(self.lengths[point] for point in self.points),
            rows=(default, *others),
            best=best,
            chunk=params.chunk,
            seconds_whole=text.seconds_whole,
            seconds_chunks=text.seconds_chunks,
            n_whole=text.n_whole,
            rounds=rounds,
            seconds=time.monotonic() - self._begin,
            tuning=tuning,
            too_long=self.too_long,
        )

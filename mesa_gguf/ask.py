"""Questions about a document, which is read once: for each question the context is rolled back to the document's end.

In short::

    prompts = make_prompts(load_vocabulary(path), document, questions)
    llm = load_model(path, n_ctx=prompts.n_ctx(max_tokens))
    read_document(llm, prompts)
    for index in range(len(questions)):
        print(answer(llm, prompts, index, max_tokens=max_tokens).text)
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import llama_cpp
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from . import devices, documents
from .config import MesaConfig
from .errors import ModelError, PromptError
from .gguf_file import KV_TYPES as KV_TYPES
from .llama import MesaLlama

# the task first: it lies in the first chunk, which every chunk reads
CHAT_FORM = "Answer the question that follows this text.\n\n{document}\n\nQuestion: {question}"
N_CTX_STEP = 256  # tokens, llama.cpp's own step


@dataclass(frozen=True)
class Prompts:
    """The prompts of all questions as token ids: prompt i is ``document + questions[i]``.

    Attributes:
        document: what all prompts begin with.
        questions: what follows, for each question.
        one_line: the answer ends with its line, as in the form without a chat template.
    """

    document: list[int]
    questions: list[list[int]]
    one_line: bool

    @property
    def n_longest(self) -> int:
        """Tokens of the longest prompt."""
        return len(self.document) + max(map(len, self.questions))

    def n_ctx(self, max_tokens: int) -> int:
        """The context that the prompts and answers of max_tokens tokens need."""
        return -(-(self.n_longest + max_tokens) // N_CTX_STEP) * N_CTX_STEP


@dataclass(frozen=True)
class Answer:
    """An answer and what it took.

    Attributes:
        text: the answer, without white space around it.
        n_question: tokens of the question that were read.
        n_tokens: tokens that were generated.
        finish_reason: "stop" where the model ended it, "length" where max_tokens or n_ctx did.
        first_token_seconds: until the first token, the reading of the question included.
        seconds: in all.
    """

    text: str
    n_question: int
    n_tokens: int
    finish_reason: Literal["stop", "length"]
    first_token_seconds: float
    seconds: float


def load_vocabulary(path: Path, verbose: bool = False) -> MesaLlama:
    """A model without its weights, to count tokens before a context is made for them.

    Raises:
        ModelError: the file cannot be used, or has no vocabulary.
    """
    config = MesaConfig(enabled=False)  # nothing is read with it
    llm = MesaLlama(path, mesa=config, vocab_only=True, n_ctx=1, n_batch=1, n_ubatch=1, verbose=verbose)
    if llama_cpp.llama_vocab_type(llm._model.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        raise ModelError(f"{path}: this model has no vocabulary: it cannot read text")
    return llm


def load_model(
    path: Path,
    *,
    n_gpu_layers: int | None = None,
    rpc_servers: str | None = None,
    seed: int | None = None,
    verbose: bool = False,
    **kwargs: Any,
) -> MesaLlama:
    """`MesaLlama` with all layers on the GPU, or on RPC servers, where there are any; seed None: another one each time.

    Raises:
        MesaError: as `MesaLlama` does.
    """
    if n_gpu_layers is None:
        n_gpu_layers = -1 if rpc_servers is not None or devices.has_gpu() else 0
    llm = MesaLlama(path, n_gpu_layers=n_gpu_layers, rpc_servers=rpc_servers, verbose=verbose, **kwargs)
    if seed is not None:
        llm.set_seed(seed)  # the constructor takes 0 for none
    return llm


def make_prompts(vocabulary: MesaLlama, document: str, questions: Sequence[str], *, plain: bool = False) -> Prompts:
    """Prompts in the model's chat template; without one, or if plain, in the form that the bundled model knows.

    Raises:
        ModelError: the model's chat template cannot be rendered.
    """
    template = vocabulary.metadata.get("tokenizer.chat_template")
    if plain or template is None:
        tokenize: Callable[[str], list[int]] = _Plain(vocabulary, document)
    else:
        tokenize = _Chat(vocabulary, document, template)
    prompts = [tokenize(question) for question in questions]
    # with a question that nobody asks, an answer does not depend on which other questions are asked
    n_document = _n_common([*prompts, tokenize("")])
    return Prompts(
        document=prompts[0][:n_document],
        questions=[prompt[n_document:] for prompt in prompts],
        one_line=isinstance(tokenize, _Plain),
    )


def read_document(llm: MesaLlama, prompts: Prompts) -> float:
    """Read the document into an empty context; returns the seconds that it took."""
    start = time.perf_counter()
    llm.reset()
    llm.eval(prompts.document)
    return time.perf_counter() - start


def answer(
    llm: MesaLlama,
    prompts: Prompts,
    index: int,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Answer question number index about the document that was read.

    Args:
        max_tokens: longest answer; the context's end cuts it short too.
        temperature: 0 takes the most likely token.
        on_text: called with each piece of the answer as it is generated.
    """
    question = prompts.questions[index]
    n_ctx = len(llm.input_ids)  # as asked for; llama.cpp's own is rounded up
    n_prompt = len(prompts.document) + len(question)
    if n_prompt >= n_ctx:
        raise PromptError(
            f"document and question have {n_prompt} tokens, which leaves no room for an answer in n_ctx ({n_ctx}): "
            f"make n_ctx {n_prompt + max_tokens} or more"
        )
    limit = min(max_tokens, n_ctx - n_prompt)

    start = time.perf_counter()
    first: float | None = None
    llm.n_tokens = len(prompts.document)  # generate() keeps these and reads what follows
    text = _Text(prompts.one_line, on_text)
    n_tokens = 0
    finish_reason: Literal["stop", "length"] = "stop"
    for token in llm.generate([*prompts.document, *question], temp=temperature):
        first = first if first is not None else time.perf_counter() - start
        if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
            break
        n_tokens += 1
        if text.add(llm.token_bytes(token)):
            break
        if n_tokens == limit:
            finish_reason = "length"
            break
    seconds = time.perf_counter() - start
    return Answer(text.end(), len(question), n_tokens, finish_reason, first or seconds, seconds)


#
# prompts
#


class _Plain:
    """The document, the question and "Answer:"; the model goes on with a line."""

    def __init__(self, vocabulary: MesaLlama, document: str) -> None:
        self._vocabulary = vocabulary
        self._document = document

    def __call__(self, question: str) -> list[int]:
        return _begin(self._vocabulary) + _tokenize(self._vocabulary, documents.prompt(self._document, question))


class _Chat:
    """The model's own chat template, with the document and the question in one message of the user."""

    def __init__(self, vocabulary: MesaLlama, document: str, template: str) -> None:
        self._vocabulary = vocabulary
        self._document = document
        self._bos = _special_text(vocabulary, vocabulary.token_bos())
        # a document that spells a control token, such as <|im_end|>, must not end the user's message
        plain, special = (_tokenize(vocabulary, document, special=value) for value in (False, True))
        self._document_is_text = plain == special
        try:
            eos = _special_text(vocabulary, vocabulary.token_eos())
            self._format = Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=self._bos)
        except TemplateError as err:
            raise self._error(err) from None

    def __call__(self, question: str) -> list[int]:
        content = CHAT_FORM.format(document=self._document, question=question).strip()
        try:
            rendered = self._format(messages=[{"role": "user", "content": content}]).prompt
        except (TemplateError, ValueError, TypeError) as err:
            raise self._error(err) from None
        begin = [] if self._bos and rendered.startswith(self._bos) else _begin(self._vocabulary)
        if self._document_is_text or content not in rendered:
            return begin + _tokenize(self._vocabulary, rendered, special=True)
        before, _, after = rendered.partition(content)
        return [
            *begin,
            *_tokenize(self._vocabulary, before, special=True),
            *_tokenize(self._vocabulary, content),
            *_tokenize(self._vocabulary, after, special=True),
        ]

    @staticmethod
    def _error(err: Exception) -> ModelError:
        return ModelError(f"the model's chat template cannot be used ({err}): --plain asks without it")


def _begin(vocabulary: MesaLlama) -> list[int]:
    """The token that begins a text, for the models that want one."""
    return [vocabulary.token_bos()] if vocabulary._model.add_bos_token() else []


def _special_text(vocabulary: MesaLlama, token: int) -> str:
    return vocabulary._model.token_get_text(token) if token != llama_cpp.LLAMA_TOKEN_NULL else ""


def _tokenize(vocabulary: MesaLlama, text: str, special: bool = False) -> list[int]:
    return vocabulary.tokenize(text.encode(), add_bos=False, special=special)


def _n_common(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))


#
# answers
#


class _Text:
    """Text from the bytes of tokens, as they come."""

    def __init__(self, one_line: bool, on_text: Callable[[str], None] | None) -> None:
        self._decoder: Any = codecs.getincrementaldecoder("utf-8")("replace")
        self._one_line = one_line
        self._on_text = on_text
        self._text = ""

    def add(self, data: bytes) -> bool:
        """Returns True if the answer is complete."""
        return self._put(self._decoder.decode(data))

    def end(self) -> str:
        self._put(self._decoder.decode(b"", True))
        return self._text.rstrip()

    def _put(self, piece: str) -> bool:
        if not self._text:
            piece = piece.lstrip()
        complete = self._one_line and "\n" in piece
        if complete:
            piece = piece.partition("\n")[0]
        self._text += piece
        if piece and self._on_text is not None:
            self._on_text(piece)
        return complete

"""Memory that is foreseen, not touched where it is not used, and given back; what ends in the rehearsal of a model file; and a
process without a standard error."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from conftest import BUNDLED, SMALL, ModelPath, random_tokens, run_python
from mesa_gguf import (
    MesaConfig,
    MesaLlama,
    MesaPlan,
    ModelError,
    OutOfMemoryError,
    _core,
    machine,
)
from mesa_gguf.model.header import check_model
from test_cli import with_template

MIB = 2**20

# Foreseen.


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], None]:
    """Makes the machine have so many bytes free."""

    def make(n_bytes: int) -> None:
        (tmp_path / "proc").mkdir(exist_ok=True)
        (tmp_path / "proc" / "meminfo").write_text(f"MemAvailable: {n_bytes // 1024} kB\n")
        monkeypatch.setattr(machine, "ROOT", tmp_path)

    return make


def test_logits_of_all_tokens_are_foreseen(model_path: ModelPath, free: Callable[[int], None]) -> None:
    """128 of them: 512 bytes a token, and once more for a batch."""
    path, n_ctx, n_batch = model_path("llama"), 16384, 256
    kv, logits = check_model(path).kv_bytes(n_ctx), 512 * (n_ctx + n_batch)
    free(kv + logits + 1024)
    MesaLlama(path, mesa=SMALL, n_ctx=n_ctx, n_batch=n_batch, logits_all=True).close()
    free(kv + logits - 1024)
    MesaLlama(path, mesa=SMALL, n_ctx=n_ctx, n_batch=n_batch).close()
    MesaLlama(path, mesa=SMALL, n_ctx=n_ctx, n_batch=n_batch, draft_model=LlamaPromptLookupDecoding()).close()
    with pytest.raises(
        OutOfMemoryError, match=r"logits of n_ctx = 16384 .*KV cache of n_ctx = 16384 .*give logits_all=False"
    ) as info:
        MesaLlama(path, mesa=SMALL, n_ctx=n_ctx, n_batch=n_batch, logits_all=True)
    fits = re.search(r"make n_ctx (\d+) or less", str(info.value))
    assert fits is not None and 16000 < int(fits[1]) < 16384
    MesaLlama(path, mesa=SMALL, n_ctx=int(fits[1]) // 256 * 256, n_batch=n_batch, logits_all=True).close()


# note: in a process of its own, whose memory nobody else takes or frees. The bundled model has 4 KiB of logits a token
TOUCHED = """
import os, sys
from pathlib import Path
from mesa_gguf import MesaConfig, MesaLlama
from llama_cpp import LlamaRAMCache
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 10

path, what = sys.argv[1:]
options = dict(n_ctx=32768, n_threads=1, n_threads_batch=1)
if what == "logits_all":
    options |= dict(logits_all=True)
elif what == "draft":
    options |= dict(draft_model=LlamaPromptLookupDecoding())
elif what == "batch":
    options |= dict(n_batch=32768)
llm = MesaLlama(path, **options)
text = llm.tokenize(b"The door code of Mara Lind is 4711. " * 40)
llm.eval(text)
before = resident()
for _ in range(3):
    llm.load_state(llm.save_state())
    llm.eval(text[:10])
print(resident() - before, len(text) * llm.n_vocab() * 4 >> 10, llm.n_ctx() * llm.n_vocab() * 4 >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what", ["logits_all", "draft", "batch"])
def test_logits_that_are_not_there_take_no_memory(what: str) -> None:
    """Saving, loading and going on: what is used is a 70th of what n_ctx tokens would have."""
    done = run_python(TOUCHED, str(BUNDLED), what)
    assert done.returncode == 0, done.stderr
    grown, used, every = (int(number) for number in done.stdout.split())
    print(f"\n{what}: {grown} KiB more; the logits of the text have {used} KiB, those of n_ctx tokens {every} KiB")
    assert grown <= 3 * used <= every / 20


def test_speculation_keeps_no_logits(model_path: ModelPath) -> None:
    """llama.cpp's own of the last batch do; logits_all keeps them."""
    llm = MesaLlama(
        model_path("llama"),
        mesa=SMALL,
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4),
        n_threads=1,
        n_threads_batch=1,
    )
    text = random_tokens(20) * 4
    tokens = [token for token, _ in zip(llm.generate(text, temp=0.0), range(30))]
    assert llm.save_state().scores.shape == (0, 128)
    assert not llm.scores.any()
    llm.close()
    llm = MesaLlama(
        model_path("llama"),
        mesa=SMALL,
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4),
        logits_all=True,
        n_threads=1,
        n_threads_batch=1,
    )
    assert [token for token, _ in zip(llm.generate(text, temp=0.0), range(30))] == tokens
    assert llm.save_state().scores.shape == (llm.n_tokens, 128)
    llm.close()


@pytest.mark.parametrize("n_draft", [4, 200])
def test_drafts_take_few_decodes(model_path: ModelPath, monkeypatch: pytest.MonkeyPatch, n_draft: int) -> None:
    """A batch of drafts is read once; only one that is longer than any sensible one is read token by token."""
    llm = MesaLlama(
        model_path("llama"),
        mesa=SMALL,
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=n_draft),
        n_threads=1,
        n_threads_batch=1,
    )
    sizes, decode = [], llm._ctx.decode
    monkeypatch.setattr(llm._ctx, "decode", lambda batch: (sizes.append(batch.n_tokens()), decode(batch)))
    tokens = [token for token, _ in zip(llm.generate(random_tokens(10) * 10, temp=0.0), range(40))]
    assert len(tokens) == 40
    if n_draft == 4:
        assert len(sizes) <= 41
    llm.close()


# Given back. The exceptions are kept, whose tracebacks keep the object.


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many models and contexts there are."""
    count = {"model": 0, "context": 0}
    bindings = llama_cpp.llama_cpp

    def watch(name: str, what: str, by: int) -> None:
        function = getattr(bindings, name)

        def counted(*args: Any) -> Any:
            result = function(*args)
            if by < 0 or result:
                count[what] += by
            return result

        monkeypatch.setattr(bindings, name, counted)

    watch("llama_model_load_from_file", "model", 1)
    watch("llama_model_free", "model", -1)
    watch("llama_init_from_model", "context", 1)
    watch("llama_free", "context", -1)
    return count


def fails(error: type[BaseException]) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error("on purpose")

    return fail


FAILURES: dict[str, dict[str, Any]] = {
    "no context": {},
    "a plan that does not fit": dict(mesa=MesaConfig(plan=MesaPlan([0, 100, 2000], anchor=2000, stair_width=4))),
    "inside of Llama": {},
    "enable fails": {},
    "interrupted": {},
    "llama.cpp's view changes": {},
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_constructor_that_fails_late_closes(
    alive: dict[str, int], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "no context":
        monkeypatch.setattr(llama_cpp.llama_cpp, "llama_init_from_model", lambda *arguments: None)
    elif what == "enable fails":
        monkeypatch.setattr(_core, "enable", fails(RuntimeError))
    elif what == "interrupted":
        monkeypatch.setattr(_core, "enable", fails(KeyboardInterrupt))
    elif what == "llama.cpp's view changes":
        monkeypatch.setattr(_core, "unsupported", lambda model: "on purpose")
    elif what == "inside of Llama":
        monkeypatch.setattr(llama_cpp.Llama, "token_nl", fails(TypeError))
    errors: list[BaseException] = []
    for _ in range(3):
        with pytest.raises(BaseException) as info:  # noqa: PT011
            MesaLlama(BUNDLED, **FAILURES[what])
        errors.append(info.value)
        assert alive == {"model": 0, "context": 0}, errors
    assert not any(isinstance(error, AttributeError) for error in errors)


def test_a_damaged_chat_template_leaves_nothing(alive: dict[str, int], tmp_path: Path) -> None:
    path = with_template(tmp_path / "syntax.gguf", "{% for %}")
    with pytest.raises(ModelError, match="chat template is damaged") as info:
        MesaLlama(path)
    assert alive == {"model": 0, "context": 0} and info.value


def test_a_refused_adapter_leaves_nothing(
    alive: dict[str, int], model_path: ModelPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesa_gguf.llama.MesaLlama._apply_adapter", fails(ModelError))
    adapter = model_path("llama").parent / "adapter.gguf"
    write_adapter(adapter)
    with pytest.raises(ModelError, match="on purpose"):
        MesaLlama(model_path("llama"), mesa=SMALL, lora_path=str(adapter))
    assert alive == {"model": 0, "context": 0}


def write_adapter(path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_arguments_that_there_are_not() -> None:
    """Of a constructor that never began there is nothing to close."""
    with pytest.raises(TypeError, match="model_path"):
        MesaLlama()  # type: ignore[call-arg]
    llm = MesaLlama.__new__(MesaLlama)
    llm.close()


# The rehearsal of a model file.


def test_how_a_rehearsal_ends(tmp_path: Path, model_path: ModelPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal, one without a name, or a code, with a word or without: the error says it, and the file."""
    results = {
        -signal.SIGSEGV: "SIGSEGV",
        -signal.SIGABRT: "SIGABRT",
        -50: "signal 50",
        -100: "signal 100",
        1: "exit code 1",
        3: "exit code 3",
        120: "exit code 120",
    }
    number = 0
    for returncode, reason in results.items():
        for stdout in (b"", b'{"unsup'):
            for stderr, said in (
                (b"", reason),
                (b"a.cpp:1: what\n/x/b.cpp:7: GGML_ASSERT(n > 0) failed\n", "b.cpp:7: GGML_ASSERT"),
            ):
                number += 1
                path = tmp_path / f"{number}.gguf"
                path.write_bytes(model_path("llama").read_bytes())
                done = SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)
                with monkeypatch.context() as patch:
                    patch.setattr(subprocess, "run", lambda *args, done=done, **kwargs: done)
                    with pytest.raises(ModelError, match=rf"{number}\.gguf: .*{re.escape(said)}"):
                        MesaLlama(path, mesa=SMALL)


def test_a_rehearsal_that_is_killed(tmp_path: Path, model_path: ModelPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel does that for want of memory: no word of a damaged file, and the next try is a new one."""
    path = tmp_path / "m.gguf"
    path.write_bytes(model_path("llama").read_bytes())
    done = SimpleNamespace(returncode=-signal.SIGKILL, stdout=b"", stderr=b"")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *args, **kwargs: done)
        with pytest.raises(OutOfMemoryError, match=r"m\.gguf: .*killed"):
            MesaLlama(path, mesa=SMALL)
    MesaLlama(path, mesa=SMALL).close()


@pytest.mark.parametrize("executable", ["", None])
def test_a_python_that_does_not_know_where_it_is(
    tmp_path: Path, model_path: ModelPath, monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(model_path("llama").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", executable)
        llm = MesaLlama(path, mesa=SMALL)
    llm.close()


# Standard error.

# note: in a process of its own, whose descriptors can be closed, in this order
STDERR = """
import io, os, sys
from mesa_gguf import MesaConfig, MesaLlama, ModelError
from llama_cpp import LlamaState

path, damaged, out = sys.argv[1:4]
problems, now = [], None
sys.unraisablehook = lambda problem: problems.append((now, problem.exc_value))
standard_error = sys.stderr
open_file = open(out, "w")
assert open_file.fileno() > 2

def closed():
    stream = io.StringIO()
    stream.close()
    return stream

STREAMS = {
    "None": lambda: None,
    "closed": closed,
    "StringIO": io.StringIO,
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"),
    "descriptor 2 closed": lambda: os.close(2),
    "descriptors 1 and 2 closed": lambda: (os.close(1), os.close(2)) and None,
}
for now, stream in STREAMS.items():
    for verbose in (False, True):
        sys.stderr = stream()
        llm = MesaLlama(path, verbose=verbose, n_threads=1, n_threads_batch=1)
        said = llm.create_completion("The door code of Zo\u00eb is 4711. The door code of Zo\u00eb is", max_tokens=2, temperature=0.0)
        state = llm.save_state()
        llm.load_state(state)
        try:
            llm.load_state(LlamaState(state.input_ids, state.scores, state.n_tokens, state.llama_state[:100], 100, 1))
            problems.append((now, "a damaged state was loaded"))
        except Exception as err:
            problems += [(now, err)] if "state" not in str(err) else []
        try:
            MesaLlama(damaged, verbose=verbose)
            problems.append((now, "a damaged file was loaded"))
        except ModelError:
            pass
        llm.close()
        print(now, verbose, said["choices"][0]["text"], sep=":", file=open_file)
print(problems, file=open_file, flush=True)
os._exit(0)  # there is nothing to flush to
"""
ANSWERS = [
    f"{what}:{verbose}: 471"
    for what in ("None", "closed", "StringIO", "ascii", "descriptor 2 closed", "descriptors 1 and 2 closed")
    for verbose in (False, True)
]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A model file that lacks a tensor."""
    data, path = bytearray(BUNDLED.read_bytes()), tmp_path / "damaged.gguf"
    data[data.index(b"output_norm")] ^= 1
    path.write_bytes(data)
    return path


def test_a_process_without_a_standard_error(tmp_path: Path, damaged: Path) -> None:
    """Nothing is lost but what nobody could read; nothing goes to standard output instead, or into another file."""
    out = tmp_path / "out"
    done = run_python(STDERR, str(BUNDLED), str(damaged), str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert out.read_text().splitlines() == [*ANSWERS, "[]"]


def test_a_process_that_begins_without_standard_streams(tmp_path: Path, damaged: Path) -> None:
    """As a service may: files that it opens do not get the numbers of standard output and error, which llama.cpp writes to."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", STDERR, str(BUNDLED), str(damaged), str(out)]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], check=False)
    assert done.returncode == 0
    assert out.read_text().splitlines() == [*ANSWERS, "[]"]

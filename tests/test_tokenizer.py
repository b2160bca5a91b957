"""Tokens are those of stock llama.cpp, and a long run without a space costs no stack and about linear time.

Steps of our matcher are counted, not seconds (`llama_mesa_regex_counts`).
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import BUNDLED, ROOT, run_python
from tokenizer_process import digest

PRE_TOKENIZERS = """
    default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano deepseek-llm deepseek-coder
    deepseek-v3 spark2_5 youtu falcon mpt starcoder gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum
    modern-bert jais-2 gemma4 granite-embed-multi-311m sarvam-moe jina-v1-en jina-v2-code roberta-bpe whitespace refact command-r
    qwen2 deepseek-r1-qwen kormo f2llmv2 qwen35 stablelm2 olmo dbrx smaug-bpe poro-chat chatglm-bpe glm4 glm5 viking jais tekken
    smollm codeshell bloom gpt3-finnish exaone exaone4 exaone-moe chameleon minerva-7b megrez gpt-4o llama4 kanana2 talkie
    granite-embed-multi-97m tiny_aya cohere2moe superbpe trillion granite-docling bailingmoe bailingmoe2 llada-moe seed-coder
    hunyuan hunyuan-dense hy_v4 joyai-llm kimi-k2 ufakzeka grok-2 afmoe laguna minimax-m2 solar-open mellum2
""".split()

NOT_OF_BYTES = ["gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"]
"""Their tokens have other names than GPT-2's for bytes and white space."""

SMALL_STACK = 256 << 10
MAIN_STACK = 8 << 20  # bytes, as a main thread has it

Text = Sequence[tuple[bytes, int]]  # pieces, and how often each of them


# Vocabularies.


def byte_names() -> list[str]:
    """GPT-2's: a printable character for each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte if byte in plain else 256 + others.index(byte)) for byte in range(256)]


CONTROL, USER_DEFINED = "<|end|>", "<tag>"


def pairs() -> list[tuple[int, int]]:
    """Of bytes, in the order of their merges. Where a text is cut decides which bytes are paired, and so which tokens there are."""
    rng = random.Random(1)
    ascii_bytes = b" \n\r\t'aAbBsStTdDmMrReElLvVzZ0123456789.,!?-/$+<=>^`|~()_\"\\"
    wanted = {(a, b) for a in ascii_bytes for b in ascii_bytes}
    wanted |= {(a, b) for a in range(0x80, 0xC0) for b in b" \n\raA1.'"}
    wanted |= {(a, b) for a in b" \n\raA1.'" for b in range(0xC2, 0xF5)}
    wanted |= {(a, b) for a in range(0x80, 0xC0) for b in b"\xc2\xc3\xcc\xd0\xe0\xe3\xe4\xe5\xea\xef\xf0"}
    out = sorted(wanted)
    rng.shuffle(out)
    return out


def write_vocabulary(path: Path, merges: Sequence[tuple[int, int]] = (), name: str = "", model: str = "gpt2") -> Path:
    """A BPE vocabulary: token i is byte i, and the merges follow."""
    names = byte_names()
    tokens = names + [names[a] + names[b] for a, b in merges]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    for text, kind in [
        (CONTROL, gguf.TokenType.CONTROL),
        (USER_DEFINED, gguf.TokenType.USER_DEFINED),
        *((text, gguf.TokenType.CONTROL) for text in ["<s>", "</s>", "<unk>", "<|endoftext|>", "<mask>"]),
    ]:
        tokens.append(text)
        types.append(kind)
    writer = begin(path, model, tokens, types)
    writer.add_token_merges([f"{names[a]} {names[b]}" for a, b in merges] or ["unused merge"])
    writer.add_tokenizer_pre("gpt-2" if model == "gpt2" else model)
    if name:
        writer.add_name(name)
    return finish(writer, path)


def begin(path: Path, model: str, tokens: Sequence[str], types: Sequence[int]) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    return writer


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


# Processes.


class Tokenizer:
    """A process that tokenizes (tokenizer_process.py)."""

    def __init__(self, path: Path, library: Path | None) -> None:
        env = {key: value for key, value in os.environ.items() if key != "LLAMA_CPP_LIB_PATH"}
        if library:
            env["LLAMA_CPP_LIB_PATH"] = str(library)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("tokenizer_process.py")), str(path)],
            env=env | {"GGML_NO_BACKTRACE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, pre: Sequence[str | None], texts: Sequence[Text | bytes], digest: bool = False, stack: int = MAIN_STACK
    ) -> list[dict[str, Any]]:
        """-> tokens (or their digest), steps, unknown: of each text with each name."""
        pieces = [[(text, 1)] if isinstance(text, bytes) else text for text in texts]
        request = {
            "pre": list(pre),
            "texts": [[(piece.hex(), n) for piece, n in text] for text in pieces],
            "digest": digest,
            "stack": stack,
        }
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process ended with {self.process.wait()}"
        out: list[dict[str, Any]] = json.loads(answer)
        return out

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.kill()  # freeing its models one by one takes seconds
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


Start = Callable[..., Tokenizer]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    started: list[Tokenizer] = []

    def starter(path: Path, library: Path | None = None) -> Tokenizer:
        started.append(Tokenizer(path, library))
        return started[-1]

    yield starter
    for tokenizer in started:
        tokenizer.close()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "pairs.gguf", pairs())


@pytest.fixture(scope="module")
def byte_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without merges: what comes out is what went in, byte for byte."""
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "bytes.gguf")


@pytest.fixture(scope="module")
def ours(start: Start, vocabulary: Path) -> Tokenizer:
    return start(vocabulary)


@pytest.fixture(scope="module")
def stock(start: Start, vocabulary: Path, stock_lib: Path) -> Tokenizer:
    return start(vocabulary, stock_lib)


@pytest.fixture(scope="module")
def distinct(ours: Tokenizer) -> list[str]:
    """A name for each list of expressions that our matcher gets; the other names go through llama.cpp's own functions.
    It takes a number of steps of its own for each."""
    sample = "It's 1234567 Zürich,\r\n\r\n  x/y…  中文！ IMGIMGABZ <sentinel:3>\n\t'LL कि (word word)" + " " * 700 + "."
    by_steps = {answer["steps"]: pre for pre, answer in zip(PRE_TOKENIZERS, ours(PRE_TOKENIZERS, [sample.encode()]))}
    assert by_steps.pop(0)
    return list(by_steps.values())


def assert_same(
    ours: Tokenizer, stock: Tokenizer, pre: Sequence[str | None], texts: Sequence[Text | bytes], **kwargs: Any
) -> None:
    # note: stock llama.cpp aborts on spaces with this one, unless the file is of that kind; see below
    pre = [name for name in pre if name != "whitespace"]
    labels = [(name, text) for name in pre for text in texts]
    for label, a, b in zip(labels, ours(pre, texts, **kwargs), stock(pre, texts, **kwargs), strict=True):
        assert a["tokens"] == b["tokens"], label
        assert not a["unknown"], label


# Texts.

SENTENCES = [
    "",
    "Hello, world! It's 3:45 o'clock; they've said “we'll see” – don't THEY'D? I'M",
    "def f(x):\n\treturn x**2  # squares\n\n\nclass A:\r\n    pass\r\n",
    "1 12 123 1234 12345 123456 1234567 1,234.56 ٣٤٥ ⅧⅨ ½ x1y22z333 007",
    "Zürich, naïve café, Ελληνικά ΑΒΓ, Русский ТЕКСТ, ქართული, Հայերեն",
    "中文字符，没有空格。日本語のテキスト、カタカナ。한국어 텍스트입니다. ㄅㄆㄇ ㄱㄴ",
    "हिन्दी में पाठ। বাংলা লেখা। ภาษาไทยไม่มีช่องว่าง ລາວ ភាសាខ្មែរ မြန်မာ",
    "العربية نص، عِبْرִית עברית ۔ اردو؟",
    "e\u0301a\u0300\u0301\u0302 A\u0301B\u0308 \u0301x Z\u0335a\u0336l\u0337g\u0338o",
    "😀😃 👨‍👩‍👧‍👦 🇩🇪🏳️‍🌈 ✂️ ①②③ →←↑↓ ∑∫√∞ €£¥ ©®™",
    "  two  spaces   three    four\t\ttabs \n \n\n x \r\r\n \u00a0\u2003\u3000\u2028\u0085y   ",
    "!!! ??? ... ---- ==== //// \\\\\\ $$$ +-*/<>=^`|~ [](){} _under_score_ \"quotes\" 'single' `code`",
    "iPhone XMLHttpRequest HELLOWorld aB Ab ABc aBC I'S I'll I'Ll I'LL x'm 'tis ''s",
    "aGVsbG8gd29ybGQ+/0x1F4a9==\nQUJDREVGR0hJSktMTU5PUA==",
    "<sentinel:12> <sentinel:> IMGIMGABCDZ IMGIMGZ IMGIMGAIZ IMGIMGABCDEZ    \t\n",
    "<|end|>a<tag> <tag>b <|end|><|end|>\n<tag>",
    "\x00a\x00\x00 b\x1f\x7f\x80\u200b\ufeff\ufffd\U0010ffff\U0001f600\u1680",
    "¡Hola! ¿Qué? «Guillemets» ‘‚„… ！＂＃ＡＢｃ１２ ﬁﬀ Ǆǅǆ ªº µ ĿĀ",
    " " * 1100 + "x",
    " " * 515,
    "\n" * 40 + " " * 9 + "\n\t",
    "1" * 100 + "." + "2" * 101 + " " + "3" * 102,
    "word " * 60,
]
INVALID = [
    b"\xff",
    b"a\x80b",
    b"\xc3",
    b"\xe4\xb8",
    b"\xf0\x9f\x98 x",
    b"\xc0\xaf\xed\xa0\x80\xed\xbf\xbf",
    b"\xfe\xff a\x00",
    b"'\xe2\x80s",
]


def real_texts() -> list[bytes]:
    """Pieces of 700 bytes; a character that is cut in two is a test too."""
    files = ["README.md", "csrc/plan.cpp", "mesa_gguf/llama.py", "docs/CONVERSATIONS.md", "Makefile"]
    data = [(ROOT / name).read_bytes()[:3500] for name in files if (ROOT / name).is_file()]
    assert data
    return [text[i : i + 700] for text in data for i in range(0, len(text), 700)]


def test_every_pre_tokenizer_is_listed(stock_lib: Path) -> None:
    source = stock_lib.parent / "llama.cpp" / "src" / "llama-vocab.cpp"
    if not source.is_file():
        pytest.skip(f"no source of llama.cpp at {source}")
    assert sorted(PRE_TOKENIZERS) == sorted(set(re.findall(r'tokenizer_pre == "([^"]+)"', source.read_text())))


def test_no_expression_is_left_to_the_regex_of_the_standard_library(ours: Tokenizer) -> None:
    answers = ours(PRE_TOKENIZERS, [b"a b"])
    assert not [pre for pre, answer in zip(PRE_TOKENIZERS, answers) if answer["unknown"]]
    assert sum(answer["steps"] > 0 for answer in answers) > 40


def test_texts(ours: Tokenizer, stock: Tokenizer, distinct: list[str]) -> None:
    assert_same(ours, stock, PRE_TOKENIZERS, [text.encode() for text in SENTENCES])
    assert_same(ours, stock, distinct, INVALID + real_texts())


CHARACTERS = st.one_of(
    st.sampled_from(sorted(set("".join(SENTENCES)))),
    st.sampled_from(sorted(" \n\r\t'aAsStTdDrReEvVlLmM0123456789.,!/-\\[]{}|~$`^")),
    st.characters(exclude_categories=("Cs",)),
)


TEXTS = st.one_of(st.text(CHARACTERS, max_size=40).map(str.encode), st.binary(max_size=20))


@given(st.lists(TEXTS, min_size=1, max_size=8))
def test_random_texts(ours: Tokenizer, stock: Tokenizer, distinct: list[str], texts: list[bytes]) -> None:
    # note: stock llama.cpp aborts on what follows a byte from 0xf4 on; see below
    assert_same(ours, stock, distinct, [re.sub(rb"[\xf4-\xf7]", b"\xff", text) for text in texts])


# Bytes and spaces that stock llama.cpp aborts on.


def test_bytes_above_the_last_character(start: Start, byte_vocabulary: Path) -> None:
    """F5 to F7, and F4 before 90 or more, look like UTF-8 of four bytes, for characters that there are not."""
    tokenizer = start(byte_vocabulary)
    bad = [b"\xf7\xbf\xbf\xbf", b"a\xf4\x90\x80\x80b", b" \xf5\x80\x80\x80\xf6\x8f\xbf\xbf "]
    replaced = [re.sub(rb"[\xf4-\xf7]...", "\ufffd".encode(), text, flags=re.DOTALL) for text in bad]
    names = [name for name in PRE_TOKENIZERS if name not in NOT_OF_BYTES]
    assert [answer["tokens"] for answer in tokenizer(names, bad)] == [list(text) for text in replaced] * len(names)
    assert len(tokenizer(NOT_OF_BYTES, bad)) == len(NOT_OF_BYTES) * len(bad)


def test_a_vocabulary_of_whitespace_kind(start: Start, stock_lib: Path, tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "vocabulary.gguf", pairs(), model="whitespace")
    assert_same(start(path), start(path, stock_lib), [None], [text.encode() for text in SENTENCES] + INVALID)


def test_spaces_that_the_pre_tokenizer_leaves_alone(ours: Tokenizer) -> None:
    """In a vocabulary of GPT-2's kind with the pre-tokenizer of another kind: there is no merge with a space, and no token."""
    (answer,) = ours(["whitespace"], [b"a  \t b"])
    assert answer["tokens"] == [ord("a"), ord("b")]


# Long runs.

BASE64 = base64.b64encode(random.Random(2).randbytes(3000))

RUNS: dict[str, bytes] = {
    "capitals": b"A" * 100,
    "small letters": b"a" * 100,
    "letters": b"Ab" * 50,
    "digits": b"7" * 100,
    "letters and digits": b"a1" * 50,
    "base64": BASE64,
    "base64 in lines": b"\n".join(BASE64[i : i + 79] for i in range(0, 4000, 80)) + b"\n",
    "hexadecimal": b"\\x3f" * 25,
    "spaces": b" " * 100,
    "blank lines": b"\n" * 100,
    "blank lines of Windows": b"\r\n" * 50,
    "lines of spaces": b"    \n" * 20,
    "tabs": b"\t" * 100,
    "no-break spaces": "\u00a0".encode() * 50,
    "dots": b"." * 100,
    "dots and spaces": b". " * 50,
    "dashes and bars": b"|---" * 25,
    "quotes": b"'" * 100,
    "contractions": b"'s'LL" * 20,
    "Chinese": "中文".encode() * 10,
    "Japanese": "カな".encode() * 10,
    "Korean": "한글".encode() * 10,
    "Chinese stops": "。，".encode() * 10,
    "Hindi": "कि".encode() * 10,
    "Thai": "ไม่".encode() * 10,
    "combining marks": "\u0301".encode() * 50,
    "letters with marks": "e\u0301".encode() * 30,
    "emoji": "😀".encode() * 25,
    "joined emoji": "👩\u200d".encode() * 10,
    "words": b"word " * 20,
    "numbers": b"123 " * 25,
    "sentinels": b"<sentinel:11" * 10,
    "images": b"IMGIMGABCD" * 10,
    "invalid UTF-8": b"\xff" * 100,
    "characters cut short": b"\xe4\xb8" * 50,
    "NULs": b"\0" * 100,
}


def run_of(name: str, n: int, *tail: bytes) -> Text:
    """About n bytes."""
    return [(RUNS[name], -(-n // len(RUNS[name]))), *((piece, 1) for piece in tail)]


def check_runs(tokenizer: Tokenizer, pre: Sequence[str], n: int, runs: Sequence[str] = tuple(RUNS)) -> None:
    """n and 10*n bytes in a thread with a small stack: what comes out is what went in, in a number of steps that grows with n."""
    labels, texts = [], []
    for name in runs:
        # what follows a run decides whether its last match holds, or all is to be tried again
        for tail in (
            [b"", b"a", b" ", b"\n"] if name in ("spaces", "blank lines", "digits", "lines of spaces") else [b""]
        ):
            labels.append((name, tail))
            texts += [run_of(name, n, tail), run_of(name, 10 * n, tail)]
    for each in pre:
        answers = tokenizer([each], texts, digest=True, stack=SMALL_STACK)
        for label, text, short, long in zip(labels, texts[1::2], answers[::2], answers[1::2], strict=True):
            assert not short["unknown"] and not long["unknown"], (each, label)
            assert 0 < long["steps"] < 10.5 * short["steps"] + 5000, (each, label)
            assert long["steps"] < 200 * 10 * n, (each, label)
            data = b"".join(piece * times for piece, times in text)
            if each not in NOT_OF_BYTES and label[0] not in ("invalid UTF-8", "characters cut short"):
                assert long["tokens"] == digest(list(data)), (each, label)


def test_long_runs(start: Start, byte_vocabulary: Path, distinct: list[str]) -> None:
    tokenizer = start(byte_vocabulary)
    check_runs(tokenizer, distinct, 500)
    check_runs(tokenizer, ["gpt-4o", "tekken"], 4_000, ["capitals", "base64", "blank lines", "dots", "Chinese"])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))
def test_very_long_runs(start: Start, byte_vocabulary: Path, distinct: list[str], part: int) -> None:
    check_runs(start(byte_vocabulary), distinct[part::6], 40_000)


PACKAGE = """
import sys, threading
from mesa_gguf import MesaLlama

def tokenize():
    for text in [b"A" * 40_000, b"QUJD+/0x" * 5_000, b"\\n" * 40_000, b"." * 40_000, "中".encode() * 40_000]:
        assert llm.detokenize(llm.tokenize(text, add_bos=False)) == text

llm = MesaLlama(sys.argv[1], n_ctx=256, kv_overrides={"tokenizer.ggml.pre": sys.argv[2]})
threading.stack_size(256 << 10)
thread = threading.Thread(target=tokenize)
thread.start()
thread.join()
print("done")
"""


@pytest.mark.parametrize("pre", ["gpt-4o", "tekken"])
def test_long_runs_through_the_package(pre: str) -> None:
    done = run_python(PACKAGE, str(BUNDLED), pre)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_runs_as_long_as_stock_reads_them(ours: Tokenizer, stock: Tokenizer, distinct: list[str]) -> None:
    assert_same(ours, stock, distinct, [run_of(name, 600, b"a") for name in RUNS])


@pytest.mark.slow
def test_long_runs_are_what_stock_reads_on_a_large_stack(
    ours: Tokenizer, stock: Tokenizer, distinct: list[str]
) -> None:
    texts = [run_of(name, 12_000, tail) for name in RUNS for tail in (b"", b"a")]
    assert_same(ours, stock, distinct, texts, digest=True, stack=1 << 30)


# Special tokens, which are cut out of the text first.


@pytest.mark.parametrize("name", ["", "phi-3"])  # the latter's special tokens take the white space behind them
def test_special_tokens(start: Start, stock_lib: Path, tmp_path: Path, name: str) -> None:
    path = write_vocabulary(tmp_path / "special.gguf", pairs(), name)
    rng = random.Random(3)
    pieces = [CONTROL, USER_DEFINED, "<s>", "</s>", "<mask>", "a", " ", "\n", "<", "end|>", "中"]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 30))).encode() for _ in range(100)]
    assert_same(start(path), start(path, stock_lib), ["gpt-4o", "jina-v2-de"], texts)


def test_many_special_tokens(start: Start, byte_vocabulary: Path) -> None:
    """Stock llama.cpp needs minutes: it counts the pieces before each of them."""
    tokenizer = start(byte_vocabulary)
    (answer,) = tokenizer(["gpt-2"], [[(USER_DEFINED.encode() + b"a" + CONTROL.encode(), 100_000)]], digest=True)
    assert answer["tokens"] == digest([257, ord("a"), 256] * 100_000)


# Tokenizers without a pre-tokenizer.


def write_other(path: Path, model: str) -> Path:
    """SPM, UGM, WPM and RWKV vocabularies: bytes, letters, and a few longer tokens."""
    words = ["a", "A", "aa", "AA", "aaaa", "AAAA", "1", ".", "..", "....", "中", "中中", "▁", "▁▁", "▁a"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = {
        "llama": ["<unk>", "<s>", "</s>"],
        "t5": ["<pad>", "</s>", "<unk>"],
        "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
    }
    tokens = [*special.get(model, ["<s>"]), *words, *(bytes_ if model == "llama" else [])]
    if model == "rwkv":
        tokens += [f"\\x{byte:02x}" for byte in range(256)]
    types = [gguf.TokenType.BYTE if text in bytes_ else gguf.TokenType.NORMAL for text in tokens]
    types[: len(special.get(model, ["<s>"]))] = [gguf.TokenType.CONTROL] * len(special.get(model, ["<s>"]))
    writer = begin(path, model, tokens, types)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    if model == "bert":
        for add, token in [(writer.add_unk_token_id, 1), (writer.add_bos_token_id, 2), (writer.add_sep_token_id, 3)]:
            add(token)
    return finish(writer, path)


@pytest.mark.parametrize("model", ["llama", "t5", "bert", "rwkv"])
def test_other_tokenizers(start: Start, stock_lib: Path, tmp_path: Path, model: str) -> None:
    """They do not recurse over the text: 40,000 bytes in a small stack, and the same tokens as stock for fewer."""
    path = write_other(tmp_path / "vocabulary.gguf", model)
    ours, stock = start(path), start(path, stock_lib)
    assert [a["tokens"] for a in ours([None], [text.encode() for text in SENTENCES] + INVALID)] == [
        a["tokens"] for a in stock([None], [text.encode() for text in SENTENCES] + INVALID)
    ]
    for answer in ours([None], [run_of(name, 40_000) for name in RUNS], digest=True, stack=SMALL_STACK):
        assert answer["tokens"]

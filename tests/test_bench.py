"""`mesa-gguf bench`: the models that it writes, what it measures and in which order, what it prints and saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import mesa_gguf
from conftest import BUNDLED, ROOT, ModelPath
from mesa_gguf import ConfigError, MesaError, cli
from mesa_gguf.cli import bench as cli_bench
from mesa_gguf.lab.bench import builds, measure, report, shapes
from mesa_gguf.lab.bench.measure import Job, Measurement, Settings
from mesa_gguf.lab.bench.shapes import SHAPES, Shape
from mesa_gguf.model.header import check_model

MIB = 2**20
THREADS = ("--threads", "1")


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache folder of our own, the same for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield shapes.cache_dir()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs the command, which must succeed -> (standard output, standard error)."""

    def run(*args: object) -> tuple[str, str]:
        code = cli.main(["bench", *map(str, args), *THREADS])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, err

    return run


patched_build = cache(builds.patched_build)  # asked once

#
# models
#


@pytest.mark.parametrize(
    ("name", "millions", "vocabulary", "heads", "rope_base", "train_length"),
    [
        ("smollm2-135m", 134.515, 49152, (9, 3), 1e5, 8192),
        ("qwen2.5-0.5b", 494.033, 151936, (14, 2), 1e6, 32768),
        ("llama-3.2-1b", 1235.814, 128256, (32, 8), 5e5, 131072),
        ("llama-2-7b", 6738.416, 32000, (32, 32), 1e4, 4096),
    ],
)
def test_llama_cpp_sees_the_real_shapes(
    tmp_path: Path,
    name: str,
    millions: float,
    vocabulary: int,
    heads: tuple[int, int],
    rope_base: float,
    train_length: int,
) -> None:
    """The files' headers, with holes for weights: they take no room on the disk."""
    shape = SHAPES[name]
    assert shape.n_params / 1e6 == pytest.approx(millions, abs=0.001)
    path = tmp_path / "model.gguf"
    shapes._write_header(path, shape, "q4_0", name).close()
    size = path.stat().st_size + sum(-(-n // 32) * 32 for n in _tensor_bytes(shape, "q4_0"))
    os.truncate(path, size)

    header = check_model(path)
    unsupported, n_params, _ = header.llama_cpp_view
    assert unsupported is None
    assert 0 <= n_params - shape.n_params <= 64  # llama.cpp counts RoPE's frequency factors
    assert header.weight_bytes == shapes.model_bytes(name, "q4_0")
    assert header.train_length == train_length
    assert header.rope["base"] == rope_base
    assert (header.get("attention.head_count"), header.get("attention.head_count_kv")) == heads
    assert header.get("vocab_size") == vocabulary


def _tensor_bytes(shape: Shape, quant: str) -> list[int]:
    return [
        shapes._n_bytes(tensor, shapes._tensor_type(shape, name, tensor, quant)) for name, tensor in shape.tensors()
    ]


@pytest.mark.parametrize("quant", shapes.QUANTS)
def test_weights_are_random_and_of_a_sensible_size(tmp_path: Path, quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "PIECE", 3 * 256 + 1)  # rows do not come out even
    shape = Shape("qwen2", 64, 2, 256, 4, 2, 320, 100, 1e4, tied=False, qkv_bias=True)
    path = tmp_path / "model.gguf"
    written: list[int] = []
    shapes.write_model(path, shape, quant, on_bytes=written.append)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    assert {name: values.shape for name, values in tensors.items()} == dict(shape.tensors())
    assert sum(written) == sum(_tensor_bytes(shape, quant)) <= path.stat().st_size
    for name, values in tensors.items():
        if values.ndim == 2:
            assert values.std() * values.shape[1] ** 0.5 == pytest.approx(1, abs=0.03), name
            assert len(np.unique(values, axis=0)) == len(values), name
        elif "norm" in name:
            assert np.all(values == 1)
        else:
            assert 0.01 < values.std() < 1, name


def test_types_are_mixed_as_llama_cpp_does() -> None:
    """Of a 0.5B shape, whose rows of 896 weights are no whole blocks of the K-quants; and of a 1B shape."""

    def kinds(name: str, quant: str) -> Counter[str]:
        shape = SHAPES[name]
        return Counter(
            shapes._tensor_type(shape, part, tensor, quant).name for part, tensor in shape.tensors() if len(tensor) > 1
        )

    assert kinds("qwen2.5-0.5b", "q4_k_m") == {"Q5_0": 24 * 5 + 12, "Q8_0": 12 + 1, "Q4_K": 12, "Q6_K": 12}
    assert kinds("qwen2.5-0.5b", "q6_k") == {"Q8_0": 24 * 6 + 1, "Q6_K": 24}
    assert kinds("llama-3.2-1b", "q4_k_m") == {"Q4_K": 16 * 5 + 2 * 8, "Q6_K": 2 * 8 + 1}
    assert kinds("llama-3.2-1b", "q5_0") == {"Q5_0": 16 * 7 + 1}


def test_llama3_frequencies() -> None:
    """The definition of Llama 3's scaling, by wave length."""
    shape = SHAPES["llama-3.2-1b"]
    expected = []
    for i in range(shape.head_size // 2):
        wave = 2 * np.pi * shape.rope_base ** (2 * i / shape.head_size)
        if wave < 8192 / 4:
            expected.append(1.0)
        elif wave > 8192:
            expected.append(32.0)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 32 + smooth))
    np.testing.assert_allclose(shapes._llama3_frequencies(shape), expected, rtol=1e-6)
    assert len({round(f, 3) for f in expected}) > 3  # the ramp is there


def test_a_model_is_written_once(cache_folder: Path) -> None:
    path = shapes.cached_model("tiny", "q4_0")
    before = path.stat().st_mtime_ns
    assert path.parent == cache_folder and shapes.cached_model("tiny", "q4_0") == path
    assert path.stat().st_mtime_ns == before
    assert not list(cache_folder.glob("*.partial"))


def test_a_model_that_was_not_finished_is_not_taken(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shapes.cached_model("tiny", "f16")
    assert not list(cache_folder.glob("tiny-f16*"))
    assert check_model(shapes.cached_model("tiny", "f16")).weight_bytes == shapes.model_bytes("tiny", "f16")


def test_no_room_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**9})())
    with pytest.raises(ConfigError, match=r"llama-2-7b in q8_0 takes 6\.7 GiB, 0\.9 GiB are free"):
        shapes.cached_model("llama-2-7b", "q8_0")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Path.home() in shapes.cache_dir().parents


#
# order and estimates
#


def settings(**fields: Any) -> Settings:
    defaults: dict[str, Any] = {
        "model": BUNDLED,
        "tokens": (512, 1024, 4096),
        "methods": ("stock", "disabled", "mesa"),
        "runs": 2,
    }
    return Settings(**defaults | fields)


def test_lengths_and_methods_take_turns() -> None:
    made = measure.jobs(settings())
    assert [job.key for job in made[:4]] == [(512, "stock"), (512, "disabled"), (512, "mesa"), (1024, "stock")]
    assert [job.key for job in made[9:]] == [job.key for job in made[:9]]
    assert [job.run for job in made] == [0] * 9 + [1] * 9


def test_long_texts_are_read_in_chunks_only() -> None:
    made = measure.jobs(settings(whole_max=1024, runs=1))
    assert [job.method for job in made if job.tokens == 4096] == ["mesa"]
    made = measure.jobs(settings(whole_max=1024, runs=1, decode_only=True))
    long = [(job.method, job.decode_only, job.save_state) for job in made if job.tokens == 4096]
    assert long == [("mesa", False, True), ("stock", True, False), ("disabled", True, False)]
    assert not any(job.decode_only or job.save_state for job in made if job.tokens < 4096)


def test_which_methods_read_in_chunks() -> None:
    chunked = {method for method in measure.method_names() if measure.in_chunks(method)}
    assert {"mesa", "mesa-exact", "star"} <= chunked
    assert not {"stock", "disabled", "stair", "rerope", "streaming-llm"} & chunked


def test_estimate() -> None:
    made = measure.jobs(settings(runs=2))
    estimate = measure.Estimate(made)
    assert estimate.seconds_left is None
    for job in made[:9]:
        estimate.add(job, job.tokens / 100)
    assert estimate.seconds_left == pytest.approx(sum(job.tokens / 100 for job in made[9:]))
    first = measure.Estimate(made)
    first.add(made[0], 10.0)
    assert first.seconds_left is not None and first.seconds_left > 10.0 * 17  # longer texts take longer


#
# medians and ratios
#


def measurement(
    method: str, run: int, tokens: int = 512, *, seconds: float, peak: int = 100 * MIB, **fields: Any
) -> Measurement:
    values = {
        "prefill_s": seconds, "first_token_s": seconds, "decode_s": seconds / 100, "decode_mean_s": seconds / 100,
        "decode_less_s": None, "memory_bytes_per_s": 1e9, "read_every": None, "read": None,
        "peak_bytes": peak, "before_bytes": 40 * MIB, "plan": None, "devices": [],
        "buffers": {"weights": {"CPU_Mapped": 10 * MIB}, "kv": {"CPU": 20 * MIB}, "compute": {"CPU": 5 * MIB}, "output": {"CPU": 0}},
    }  # fmt: skip
    return Measurement(Job(run, tokens, method), seconds, values | fields)


def make_report(measurements: Sequence[Measurement], **fields: Any) -> report.Report:
    build = builds.Build("python", None, True, "0", "3", "CPU : AVX2 = 1 |", {}, [])
    machine = builds.Machine("CPU", 2, 2**34, "Linux", 0.0)
    used = settings(tokens=(512, 1024), **fields)
    return report.make_report(machine, build, build, report.describe_model(used, False, "model"), used, measurements)


def test_medians_and_ratios() -> None:
    times = {"stock": (10.0, 20.0, 40.0), "mesa": (5.0, 8.0, 30.0)}
    made = make_report(
        [measurement(method, run, seconds=s) for method, all_s in times.items() for run, s in enumerate(all_s)]
    )
    stock, mesa = made.results
    assert (stock.prefill_s, mesa.prefill_s) == (20.0, 8.0)
    assert mesa.prefill_tokens_per_s == 64 and mesa.decode_tokens_per_s == pytest.approx(12.5)
    assert made.baseline == "stock" and stock.ratios is None and mesa.ratios is not None
    assert mesa.ratios["prefill_time"] == report.Ratio(0.4, 0.4, 0.75)
    assert mesa.ratios["memory"].median == 1
    assert mesa.buffers == {"weights": 10 * MIB, "kv": 20 * MIB, "compute": 5 * MIB, "output": 0}
    assert mesa.before_bytes == 40 * MIB


def test_memory_of_a_device_is_counted() -> None:
    buffers = {
        "weights": {"CPU_Mapped": MIB, "CUDA0": 7 * MIB},
        "kv": {"CUDA0": 4 * MIB},
        "compute": {"CUDA_Host": MIB},
        "output": {},
    }
    made = make_report([measurement("mesa", 0, seconds=1.0, buffers=buffers)])
    assert made.results[0].memory_bytes == 111 * MIB


def test_without_stock_the_ratios_are_to_mesa_disabled() -> None:
    made = make_report([measurement("disabled", 0, seconds=4.0), measurement("mesa", 0, seconds=1.0)])
    assert made.baseline == "disabled" and made.results[1].ratios is not None
    assert made.results[1].ratios["decode_time"].median == 0.25


def test_flatness() -> None:
    times = {512: (1.0, 4.0, 2.0), 1024: (2.2, 6.0, 4.4)}
    made = make_report(
        [measurement("mesa", i, n, seconds=s) for n, all_s in times.items() for i, s in enumerate(all_s)]
    )
    assert list(made.flatness) == [1024]
    ratio = made.flatness[1024]
    assert (ratio.median, ratio.low, ratio.high) == (pytest.approx(1.1), pytest.approx(0.75), pytest.approx(1.1))


def test_a_failure_is_reported_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fails(build: Any, request: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        asked.append(request["method"])
        if request["method"] == "stock":
            raise MesaError("killed")
        return measurement("mesa", 0, seconds=1.0).values

    monkeypatch.setattr(measure, "run_worker", fails)
    build = builds.Build("python", None, True, "0", "3", "", {}, [])
    made = list(measure.measure(settings(tokens=(512,), methods=("stock", "mesa")), build, build))
    assert asked == ["stock", "mesa", "mesa"]
    assert [m.error for m in made] == ["killed", None, "killed", None]
    shown = make_report(made)
    assert shown.results[0].error == "killed" and shown.baseline == "stock" and not shown.results[1].ratios
    assert json.dumps(shown.json)


#
# the command
#


def test_bench_end_to_end(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    """Without stock, so that it runs anywhere."""
    output, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    args = ("--shape", "tiny", "--tokens", "256,1280", "--train-length", "256", "--runs", "1", "--decode", "4")
    out, err = run(*args, "--method", "disabled,mesa", "--output", output, "--plot", picture)
    for part in ("tiny q8_0, 2.6 M parameters", "T = 256 (the model's own is 512)", "machine", "AVX" if sys.platform == "linux" else "CPU",
                 "the patched library with Mesa disabled", "compute", "a token of a text of 1280 takes"):  # fmt: skip
        assert part in out, part
    assert err.count(" left\n") == 4 and "4 of 4: mesa, 1280 tokens" in err
    assert picture.read_bytes().startswith(b"\x89PNG")

    saved = json.loads(output.read_text())
    assert set(saved) == {
        "command", "format", "time", "machine", "builds", "model", "settings", "baseline", "results", "flatness", "measurements",
    }  # fmt: skip
    assert saved["baseline"] == "disabled" and saved["builds"]["stock"] is None
    assert (
        saved["builds"]["patched"]["mesa_gguf"] == mesa_gguf.__version__ and saved["builds"]["patched"]["system_info"]
    )
    assert saved["model"]["train_length"] == 256 and saved["model"]["n_params"] == SHAPES["tiny"].n_params
    assert saved["settings"]["tokens"] == [256, 1280] and saved["settings"]["threads"] == 1
    assert str(tmp_path) not in output.read_text()  # no paths of this machine

    script = [sys.executable, str(ROOT / "experiments" / "results.py"), ".", "--output", "RESULTS.md"]
    subprocess.run(script, cwd=tmp_path, check=True)
    page = (tmp_path / "RESULTS.md").read_text()
    assert f"    {saved['command']}" in page and "![Memory, latency and decoding by length](bench.png)" in page
    assert sum(line.startswith(("| 256 |", "| 1,280 |")) for line in page.splitlines()) == len(saved["results"])

    assert [(r["tokens"], r["method"]) for r in saved["results"]] == [
        (256, "disabled"),
        (256, "mesa"),
        (1280, "disabled"),
        (1280, "mesa"),
    ]
    header = check_model(shapes.cached_model("tiny", "q8_0"))
    for r in saved["results"]:
        assert 0 < r["prefill_s"] < r["first_token_s"] < r["prefill_s"] + 1
        assert r["prefill_tokens_per_s"] == pytest.approx(r["tokens"] / r["prefill_s"])
        assert r["decode_tokens_per_s"] == pytest.approx(1 / r["decode_s"])
        n_ctx = {256: 512, 1280: 1536}[r["tokens"]]
        assert r["buffers"]["kv"] == pytest.approx(header.kv_bytes(n_ctx), abs=0.01 * MIB)
        assert r["buffers"]["weights"] == pytest.approx(header.weight_bytes, abs=0.03 * MIB)  # whole pages
        assert r["buffers"]["compute"] > MIB
        assert r["memory_bytes"] > r["buffers"]["kv"] + r["buffers"]["weights"]
    plans = {(r["tokens"], r["method"]): r["plan"] for r in saved["results"]}
    assert (
        plans[256, "disabled"] is None and plans[256, "mesa"]["n_chunks"] == 1 and plans[1280, "mesa"]["n_chunks"] > 4
    )
    assert plans[1280, "mesa"]["stair_width"] > 1


def test_bench_against_stock(
    run: Callable[..., tuple[str, str]], stock_lib: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MESA_STOCK_LIB", raising=False)
    args = (
        "--shape",
        "tiny",
        "--tokens",
        "512",
        "--tokens",
        "1024",
        "--train-length",
        "256",
        "--runs",
        "1",
        "--decode",
        "4",
    )
    limit = ("--stock-max", "512", "--decode-only", "--type-k", "q8_0")
    out, err = run(*args, *limit, "--method", "stock", "--method", "mesa", "--stock-lib", stock_lib, "--json")
    assert "the same build flags as patched" in err and "medians" not in out
    saved = json.loads(out)
    results = {(r["tokens"], r["method"]): r for r in saved["results"]}
    assert all(r["error"] is None for r in results.values())
    assert set(results[512, "mesa"]["ratios"]) == {"prefill_time", "first_token_time", "decode_time", "memory"}
    # the long text is read by Mesa alone, stock goes on from there
    assert results[1024, "stock"]["decode_only"] and results[1024, "stock"]["prefill_s"] is None
    assert results[1024, "stock"]["decode_s"] > 0 and results[1024, "mesa"]["prefill_s"] > 0
    assert set(results[1024, "mesa"]["ratios"]) == {"decode_time"}
    assert saved["builds"]["stock"]["llama_cpp_python"] == saved["builds"]["patched"]["llama_cpp_python"]
    assert not list(cache_folder.glob("state-*"))


def test_bench_on_a_given_model(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    args = ("-m", BUNDLED, "--tokens", "600", "--method", "mesa,rerope", "--runs", "1", "--decode", "0")
    out, _ = run(*args, "--json")
    saved = json.loads(out)
    assert saved["model"]["name"] == BUNDLED.name and not saved["model"]["random_weights"]
    assert saved["baseline"] is None
    assert all(r["decode_s"] is None and r["prefill_s"] > 0 for r in saved["results"])
    assert [r["method"] for r in saved["results"]] == ["mesa", "rerope"]


def test_stock_in_another_python(stock_lib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes get the library, and not what belongs to our Python."""
    script = tmp_path / "python"
    folder = Path(mesa_gguf.__file__).parent.parent
    script.write_text(
        f'#!/bin/sh\n[ -z "$PYTHONPATH" ] || exit 3\nPYTHONPATH="{os.environ.get("PYTHONPATH", folder)}" exec "{sys.executable}" "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", str(folder)))
    build = builds.stock_build(str(script), stock_lib)
    assert not build.patched and build.python == str(script)
    answer = builds.run_worker(build, measure._request(settings(runs=1), Job(0, 64, "stock"), None))
    assert answer["prefill_s"] > 0


def test_without_stock_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MESA_STOCK_LIB", str(tmp_path))
    monkeypatch.setattr("llama_cpp.__path__", [str(tmp_path)])
    build, used = cli_bench._find_stock(settings())
    assert build is None and used == settings(methods=("disabled", "mesa"))
    told = capsys.readouterr().err
    assert "no unpatched llama.cpp to compare with (there is no libllama in MESA_STOCK_LIB" in told
    assert "measuring without" in told and told.count("\n") == 1
    with pytest.raises(ConfigError, match="no unpatched llama"):
        cli_bench._find_stock(settings(methods=("stock",)))


def test_stock_that_llama_cpp_python_has_installed(
    stock_lib: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lib").symlink_to(stock_lib)
    monkeypatch.delenv("MESA_STOCK_LIB", raising=False)
    monkeypatch.setattr("llama_cpp.__path__", [str(tmp_path)])
    build, _ = builds.find_stock()
    assert build is not None and build.library_dir == tmp_path / "lib" and not build.patched


def test_cmake_facts(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "CMakeCache.txt").write_text(
        "# a comment\nCMAKE_BUILD_TYPE:STRING=Release\nCMAKE_CXX_COMPILER:FILEPATH=/usr/bin/c++\nCMAKE_CXX_FLAGS:STRING=-O3 -DX=1\n"
        "CMAKE_C_FLAGS:STRING=\nGGML_NATIVE:BOOL=ON\n"
    )
    expected = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": "c++",
        "CMAKE_CXX_FLAGS": "-O3 -DX=1",
        "GGML_NATIVE": "ON",
    }
    assert builds._cmake_facts(tmp_path / "lib") == expected


def test_an_interrupted_run_shows_what_it_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*args: Any) -> Any:
        yield measurement("mesa", 0, seconds=1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure", interrupted)
    output = tmp_path / "bench.json"
    args = ["bench", "--shape", "tiny", "--tokens", "512", "--method", "mesa", "--output", str(output), *THREADS]
    assert cli.main(args) == 130
    out, err = capsys.readouterr()
    assert "medians" in out and err.endswith("mesa-gguf: interrupted\n")
    assert len(json.loads(output.read_text())["measurements"]) == 1


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--shape", "gpt-5"], "there is no shape gpt-5: use one of tiny, smollm2-135m"),
        (["--quant", "q3_k"], "not in q3_k"),
        (["--tokens", "2k"], "--tokens 2k"),
        (["--tokens", "0"], "--tokens 0"),
        (["--method", "mesa,off"], "the method off is called disabled now: give disabled"),
        (["--method", "magic"], "there is no method magic: use one of stock, disabled, mesa"),
        (["--runs", "0"], "--runs"),
        (["--decode", "-1"], "--decode"),
        (["--type-k", "q9_9"], "q9_9"),
        (
            ["--type-v", "q8_0", "--flash-attn", "off", "--method", "mesa"],
            "values in q8_0 need flash attention: give --flash-attn on",
        ),
        (["--flash-attn", "auto"], "--flash-attn auto: it must be on or off"),
        (["--method", "disabled,mesa", "--decode-only"], "give --stock-max N"),
        (["--method", "disabled", "--stock-max", "100"], "nothing is left to measure"),
        (["--method", "mesa", "--train-length", "256", "--chunk", "300"], "reading_length (256)"),
        (["--method", "mesa", "--tokens", "2000000000"], "GiB are free"),
        (["-m", "BUNDLED", "--shape", "tiny"], "-m names a file"),
        (["-m", "missing.gguf"], "missing.gguf: there is no such file"),
        (["-m", "MAMBA", "--method", "mesa"], "recurrent"),
        (["--stock-lib", "FOLDER"], "there is no libllama"),
        (["--stock-lib", "OURS"], "mesa-gguf's own"),
        (["--stock-python", "no-such-python"], "there is no such program"),
        (["--stock-python", "FALSE"], "llama_cpp cannot be used there"),
        (["--output", "missing/bench.json"], "no such folder"),
        (["--plot", "bench.doc"], "bench.doc"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model_path: ModelPath,
    args: list[str],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(builds, "patched_build", patched_build)
    names = {"BUNDLED": BUNDLED, "FOLDER": tmp_path, "OURS": Path(mesa_gguf._llama_cpp.LIBRARY_DIR), "FALSE": "false"}
    given = [str(model_path("mamba") if arg == "MAMBA" else names.get(arg, arg)) for arg in args]
    if "-m" not in given and "--shape" not in given:
        given += ["--shape", "tiny"]
    assert cli.main(["bench", *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and problem in err and err.startswith("mesa-gguf: ") and err.count("\n") == 1


def test_quick_asks_for_little(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Settings] = []

    def record(settings: Settings, *_: Any) -> Any:
        seen.append(settings)
        yield measurement("mesa", 0, settings.tokens[0], seconds=1.0)

    monkeypatch.setattr(measure, "measure", record)
    for extra in ((), ("--tokens", "300", "--runs", "2")):
        assert cli.main(["bench", "--quick", "--shape", "tiny", "--method", "mesa", *extra, *THREADS]) == 0
    capsys.readouterr()
    assert (seen[0].tokens, seen[0].runs, seen[0].decode, seen[0].train_length) == ((512, 2048), 1, 8, 512)
    assert (seen[1].tokens, seen[1].runs, seen[1].decode) == ((300,), 2, 8)  # what is said counts

"""Runs the tests of llama.cpp and of llama-cpp-python on the patched llama.cpp and on the same one unpatched, side by side.

    python scripts/upstream_tests.py [--only ctest|python] [--jobs N] [-R REGEX]

Both come out of the pinned source distribution and are built with the flags of the wheel, one after the other in the same
folder, so that the second build compiles only what the patches touch. Tests that download something are left out, those
that need some model get the bundled one. What is left out is printed, with the reason. Exit code 1 if a test passes
unpatched and does not pass patched.

The first time takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from building import ROOT, build, package

FOLDER = ROOT / "build" / "upstream"
TREE = FOLDER / "tree"
MODEL = ROOT / "mesa_gguf" / "data" / "mesa-reader-q8_0.gguf"

BUILDS = {"unpatched": {"MESA_BUILD_STOCK": "ON"}, "patched": {"MESA_BUILD_STOCK": "OFF"}}

# test of llama.cpp's CMake -> why it is not run
LEFT_OUT = {
    "test-tokenizers-ggml-vocabs": "downloads its vocabularies",
    "test-download-model": "downloads a model; the tests that want it get the bundled one",
    "test-chat": "tests the server, of which no part is built here",
    "test-mtmd-c-api": "tests libmtmd (pictures and sound), of which no part is built here",
    "test-mtmd-impl": "tests libmtmd (pictures and sound), of which no part is built here",
    "test-jinja-py": "runs the Python package jinja2 against llama.cpp's templates, nothing of the library",
}
# programs that llama.cpp builds beside its tests and does not run as such
NOT_TESTS = (
    "test-quantize-stats, test-gbnf-validator, test-chat-analysis, test-fusion, test-export-graph-ops, test-double-float; "
    "test-rpc-multi-server (it comes with the tools; tests/test_rpc.py does it here)"
)
# what the kernels of this project compute on the CPU: test-backend-ops compares them with ggml's own
OPERATIONS = ("MUL_MAT", "MUL_MAT_ID", "FLASH_ATTN_EXT")
# test -> the program that it runs, where their names differ
PROGRAMS = (
    (re.compile(r"test-tokenizer-0-.*"), "test-tokenizer-0"),
    (re.compile(r"test-tokenizer-1-.*spm"), "test-tokenizer-1-spm"),
    (re.compile(r"test-generate-models"), "test-llama-archs"),
)

Results = dict[str, str]  # test -> passed, failed or skipped


def program(test: str) -> str:
    return next((name for pattern, name in PROGRAMS if pattern.fullmatch(test)), test)


# ------------------------------------------------------------------------------------------------------ llama.cpp


def registered() -> list[str]:
    """The tests that llama.cpp's CMake defines."""
    command = ["ctest", "--test-dir", TREE / "llama.cpp-build", "--show-only=json-v1"]
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    return [test["name"] for test in json.loads(done.stdout)["tests"]]


def run_ctest(name: str, pattern: str, jobs: int | None) -> Results:
    options = {"MESA_BUILD_TESTS": "ON", **BUILDS[name]}
    build(TREE, options, ["llama", "llama-common", *(["_core"] if name == "patched" else [])], jobs)
    shutil.copytree(TREE / "lib", FOLDER / name / "lib", dirs_exist_ok=True)
    if name == "patched":
        package(TREE, FOLDER / name / "site")
    tests = [test for test in registered() if test not in LEFT_OUT and re.search(pattern, test)]
    build(TREE, options, sorted({program(test) for test in tests} | {"test-c"}), jobs)

    model = TREE / "tinyllamas" / "stories15M-q4_0.gguf"  # where llama.cpp's tests look for their model
    model.parent.mkdir(exist_ok=True)
    shutil.copyfile(MODEL, model)
    report = FOLDER / name / "ctest.xml"
    command = ["ctest", "--test-dir", TREE / "llama.cpp-build", "--output-junit", report, "--timeout", "1800"]
    command += ["--fixture-exclude-setup", "test-download-model", "-R", f"^({'|'.join(map(re.escape, tests))})$"]
    print("+", *command, flush=True)
    subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "LLAMACPP_TEST_MODELFILE": str(model), "GGML_NO_BACKTRACE": "1"},
        check=False,
    )
    status = {"run": "passed", "fail": "failed"}
    return {
        case.attrib["name"]: status.get(case.attrib["status"], "skipped")
        for case in ElementTree.parse(report).getroot().iter("testcase")
    }


def run_operations(jobs: int | None) -> Results:
    """test-backend-ops, patched, with the CPU as the device: what it computes against what it computes as the reference.

    The reference (ggml_backend_cpu_set_use_ref) is ggml's own kernels, so this compares ours with them. Unpatched it would compare these
    operations with themselves.
    """
    build(TREE, {"MESA_BUILD_TESTS": "ON", **BUILDS["patched"]}, ["test-backend-ops"], jobs)
    program = next(path for path in TREE.rglob("test-backend-ops") if path.is_file())
    command = [program, "test", "-b", "CPU", "-o", ",".join(OPERATIONS), "-j", jobs or os.cpu_count() or 1]
    print("+", *command, flush=True)
    log = FOLDER / "operations.log"
    with log.open("w") as file:
        done = subprocess.run([str(word) for word in command], check=False, stdout=file, stderr=subprocess.STDOUT)
    results: Results = {}
    for line in log.read_text(errors="replace").splitlines():
        if match := re.fullmatch(r"  (\w+\(.*\)): (?:.* )?\x1b\[1;3[12]m(OK|FAIL)\x1b\[0m", line):
            test = match[1]
            while test in results:  # some are there twice
                test += " again"
            results[test] = "passed" if match[2] == "OK" else "failed"
    results["all of them"] = "passed" if done.returncode == 0 and results else "failed"
    return results


# ----------------------------------------------------------------------------------------------- llama-cpp-python


def unpack(folder: Path) -> None:
    """llama-cpp-python's tests and the vocabulary that they read."""
    spec = importlib.util.spec_from_file_location("fetch_llama_cpp", ROOT / "cmake" / "fetch_llama_cpp.py")
    assert spec and spec.loader
    fetch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetch)
    sdist = fetch.fetch_sdist(ROOT / "cmake" / "llama-cpp-python.txt", ROOT / "build" / "download")
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = Path(*Path(member.name).parts[1:])
            if member.isfile() and (
                path.parts[:1] == ("tests",) or path.match("vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf")
            ):
                file = archive.extractfile(member)
                assert file is not None
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(file.read())


def packages() -> Path:
    """Packages that those tests import beside what mesa-gguf's own need, in a folder of their own."""
    folder = FOLDER / "packages"
    if not (folder / "scipy").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "--no-deps", "scipy"]
        subprocess.run(command, check=True)
    return folder


def run_python_tests(name: str, mesa: bool = False) -> Results:
    folder, report = FOLDER / "llama-cpp-python", FOLDER / f"python-{name}{'-mesa' * mesa}.xml"
    paths = [Path(__file__).parent, packages()]
    environment = {**os.environ, "UPSTREAM_MODEL": str(MODEL), "PYTHONSAFEPATH": "1"}
    if mesa:
        paths.insert(0, FOLDER / name / "site")
        environment["UPSTREAM_MESA"] = "1"
    else:
        environment["LLAMA_CPP_LIB_PATH"] = str(FOLDER / name / "lib")
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "upstream_plugin",
        "--junit-xml",
        str(report),
        "-q",
        "-rs",
        "tests",
    ]
    print("+", *command, flush=True)
    report.unlink(missing_ok=True)
    subprocess.run(command, cwd=folder, env=environment, check=False)
    results = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome = {child.tag for child in case}
        failed = outcome & {"failure", "error"}
        results[f"{case.attrib['classname']}.{case.attrib['name']}"] = (
            "failed" if failed else "skipped" if "skipped" in outcome else "passed"
        )
    return results


# --------------------------------------------------------------------------------------------------------- report


def counts(results: Results) -> str:
    count = Counter(results.values())
    return f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped"


def compare(title: str, columns: dict[str, Results]) -> list[str]:
    """Print the counts side by side, and each test that fails or that they differ in -> those that do worse than unpatched."""
    print(f"\n{title}")
    for name, results in columns.items():
        print(f"  {name:<12} {counts(results)}")
    worse = []
    for test in sorted(set().union(*columns.values())):
        outcomes = {name: results.get(test, "missing") for name, results in columns.items()}
        if len(set(outcomes.values())) > 1 or "failed" in outcomes.values():
            print(f"    {test}: {', '.join(f'{name} {outcome}' for name, outcome in outcomes.items())}")
        if outcomes.get("unpatched", "passed") == "passed" and set(outcomes.values()) != {"passed"}:
            worse.append(test)
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        choices=["ctest", "operations", "python"],
        help="one of them: llama.cpp's tests, its test-backend-ops, or llama-cpp-python's tests, which need the builds of ctest",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="compile on N cores")
    parser.add_argument(
        "-R", dest="pattern", default="", metavar="REGEX", help="only tests of llama.cpp whose name matches"
    )
    arguments = parser.parse_args()

    tables: dict[str, dict[str, Results]] = {}
    if arguments.only != "python":
        if arguments.only != "operations":
            tables["llama.cpp (ctest)"] = {name: run_ctest(name, arguments.pattern, arguments.jobs) for name in BUILDS}
        if arguments.only != "ctest":
            tables["llama.cpp (test-backend-ops)"] = {"patched": run_operations(arguments.jobs)}
    if arguments.only in (None, "python"):
        unpack(FOLDER / "llama-cpp-python")
        tables["llama-cpp-python (pytest)"] = {
            **{name: run_python_tests(name) for name in BUILDS},
            "MesaLlama": run_python_tests("patched", mesa=True),
        }

    worse = [test for title, columns in tables.items() for test in compare(title, columns)]
    if arguments.only in (None, "ctest"):
        print("\nLeft out of llama.cpp's:", *(f"  {test}: {reason}" for test, reason in LEFT_OUT.items()), sep="\n")
        print(f"  Not tests: {NOT_TESTS}")
    if worse:
        print("\nWorse than unpatched:", *worse, sep="\n  ")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())

"""Does to a library what happens to libraries: processes are killed at any moment, files are damaged, clocks jump, disks are full.
After each fault, what was added is there, and every answer is the one of a library that nothing happened to.

    python library_faults.py kill --n 1000
    python library_faults.py damage --n 10000
    python library_faults.py disk --n 20        (as root, on Linux: mounts a small tmpfs)

Every round follows from a seed and its number, which is printed where something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from mesa_gguf import MesaLlama, Reader
from mesa_gguf.errors import MesaError
from mesa_gguf.lab.documents import Fact, make_document
from mesa_gguf.library.library import Library
from mesa_gguf.library.store import LibraryError
from mesa_gguf.model.bundled import bundled_model

BUDGET = 10**8
N_DOCUMENTS = 4
N_VERSIONS = 2
N_TOKENS = 1600  # of a document, about


class Wrong(Exception):
    """The library did what it must not do."""


@dataclass(frozen=True)
class Version:
    """A document at some time."""

    text: str
    facts: tuple[Fact, ...]


def open_model() -> MesaLlama:
    return MesaLlama(bundled_model(), n_ctx=4096, n_threads=1, n_threads_batch=1)


def documents() -> dict[tuple[int, int], Version]:
    """Each document in its versions. note: the first half of a document is the same in all of them."""
    made = {}
    for which in range(N_DOCUMENTS):
        whole = make_document(100 + which, N_TOKENS, n_facts=6)
        for version in range(N_VERSIONS):
            text = whole.text if version == 0 else f"{whole.text}\n\n{make_document(200 + which, 300, n_facts=1).text}"
            made[which, version] = Version(text, whole.facts)
    return made


class Expected:
    """The answers of a library that nothing happened to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.documents = documents()
        self.answers: dict[tuple[int, int, int], str] = {}

    def answer(self, llm: MesaLlama, which: int, version: int, n: int) -> str:
        if (which, version, n) not in self.answers:
            document = self.documents[which, version]
            with Library(self.folder / "expected", budget=BUDGET) as library:
                added = library.add_text(document.text, f"{which}.txt")
                stream = Reader(llm, library).ask(document.facts[n].question, documents=[added], max_tokens=16)
                self.answers[which, version, n] = stream.answer.text
        return self.answers[which, version, n]

    def write(self, folder: Path, which: int, version: int) -> Path:
        path = folder / f"{which}.txt"
        path.write_text(self.documents[which, version].text, encoding="utf-8")
        return path

    def ask(self, reader: Reader, library: Library, which: int, version: int, n: int) -> None:
        """Ask about a document, and compare the answer."""
        chosen = [document for document in library.documents() if document.name == f"{which}.txt"]
        if not chosen:
            raise Wrong(f"document {which} is lost")
        question = self.documents[which, version].facts[n].question
        answer = reader.ask(question, documents=chosen, max_tokens=16).answer
        if library.text(chosen[-1]) != self.documents[which, version].text:
            raise Wrong(f"the text of document {which} is another one")
        expected = self.answer(reader.llm, which, version, n)
        if answer.text != expected:
            raise Wrong(f"{question} was answered by {answer.text!r}, not {expected!r}")


#
# killed processes
#


def live(folder: Path, expected: Expected, seed: int, log: int) -> None:
    """Use a library until somebody kills the process; what is done is written to a pipe, before and after."""
    rng = random.Random(seed)

    def note(text: str) -> None:
        os.write(log, f"{text}\n".encode())

    files = folder / f"files-{os.getpid()}"
    files.mkdir(exist_ok=True)  # numbers of processes come again
    with Library(folder / "library", budget=BUDGET) as library, contextlib.closing(open_model()) as llm:
        reader = Reader(llm, library)
        while True:
            which, version = rng.randrange(N_DOCUMENTS), rng.randrange(N_VERSIONS)
            act = rng.choice(("add", "add", "ask", "ask", "ask", "prune", "verify", "collection"))
            if act == "add":
                path = folder / "files" / f"{which}.txt"
                note(f"adding {which} {version}")
                text = expected.documents[which, version].text
                temporary = files / path.name
                temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, path)
                library.add(path)
                note(f"added {which} {version}")
            elif act == "ask":
                there = library.documents()
                if there:
                    question = expected.documents[int(there[-1].name[0]), 0].facts[rng.randrange(6)].question
                    try:
                        _ = reader.ask(question, documents=[rng.choice(there)], max_tokens=4).answer
                    except LibraryError as err:  # another process put another version in its place, before it was read
                        if "is not in the library" not in str(err):
                            raise
            elif act == "prune":
                library.prune(rng.choice((0, 10**6, BUDGET)))
            elif act == "verify":
                library.verify()
            elif library.documents():
                with contextlib.suppress(LibraryError, IndexError):  # likewise
                    library.index.add_to_collection("work", [rng.choice(library.documents()).id])


def forked(work: Callable[[], None]) -> int:
    """The process that does some work, and ends with 0 if nothing went wrong. note: forked, because starting Python takes a second."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def check(folder: Path, expected: Expected, there: dict[int, set[int]], seed: int) -> None:
    """What was added is there, in one of the versions that it may have; no kept chunk is damaged; answers are right."""
    rng = random.Random(seed)
    with Library(folder / "library", budget=BUDGET) as library, contextlib.closing(open_model()) as llm:
        if library.mended is not None:
            raise Wrong(library.mended)
        texts: dict[int, list[str]] = {}
        for document in library.documents():
            texts.setdefault(int(document.name[0]), []).append(library.text(document))
        for which, versions in there.items():
            found = texts.get(which, [])
            if len(found) != 1 or found[0] not in {expected.documents[which, v].text for v in versions}:
                raise Wrong(f"document {which} is there {len(found)} times, or in a version that it never had")
        damaged = library.verify()
        if damaged.damaged or damaged.documents:
            raise Wrong(f"damaged: {damaged}")
        reader = Reader(llm, library)
        for which in rng.sample(sorted(there), min(1, len(there))):
            version = next(v for v in range(N_VERSIONS) if texts[which][0] == expected.documents[which, v].text)
            expected.ask(reader, library, which, version, rng.randrange(6))


def kill(n: int, seed: int) -> Counter[str]:
    """Processes that use one library are killed, n times."""
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    with TemporaryDirectory() as name:
        folder = Path(name)
        expected = Expected(folder)
        (folder / "files").mkdir()
        there: dict[int, set[int]] = {}
        for number in range(n):
            n_processes = rng.choice((1, 1, 2))  # two at once, now and then
            readers, processes = [], []
            for _ in range(n_processes):
                reading, writing = os.pipe()
                of_child = rng.randrange(2**32)
                processes.append(forked(partial(live, folder, expected, of_child, writing)))
                os.close(writing)
                readers.append(reading)
            time.sleep(rng.uniform(0.05, 0.7))
            for process in processes:
                os.kill(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
                if not os.WIFSIGNALED(status):
                    raise Wrong(f"round {number} of seed {seed}: the process ended by itself")
            lines = []
            for reading in readers:
                with os.fdopen(reading, "rb") as log:
                    lines.append([line.split() for line in log.read().decode().splitlines()])
            _follow(there, lines, counts)
            status = os.waitpid(forked(partial(check, folder, expected, there, number)), 0)[1]
            if status != 0:
                raise Wrong(f"round {number} of seed {seed}")
            counts["killed"] += n_processes
    return counts


def _follow(there: dict[int, set[int]], logs: list[list[list[str]]], counts: Counter[str]) -> None:
    """The versions that documents may have after processes wrote their logs."""
    for which in range(N_DOCUMENTS):
        begun = {int(v) for log in logs for act, w, v in log if act == "adding" and int(w) == which}
        last = [[(act, int(v)) for act, w, v in log if int(w) == which][-1:] for log in logs]
        ends = [log[0] for log in last if log]
        counts["added"] += sum(act == "added" and int(w) == which for log in logs for act, w, _ in log)
        if not begun:
            continue
        if len(ends) == 1 and ends[0][0] == "added":
            there[which] = {ends[0][1]}
        elif which in there or any(act == "added" for log in logs for act, w, _ in log if int(w) == which):
            there[which] = there.get(which, set()) | begun
        else:  # begun for the first time, and not finished: it may be there or not
            counts["unsure"] += 1


#
# damaged files
#


def damage(n: int, seed: int) -> Counter[str]:
    """Files of a library are damaged, n times: its chunks mostly, its index now and then."""
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    with contextlib.closing(open_model()) as llm, TemporaryDirectory() as name:
        expected = Expected(Path(name))
        good, bad = Path(name) / "good", Path(name) / "bad"
        with Library(good, budget=BUDGET) as library:
            for which in range(N_DOCUMENTS):
                added = library.add(expected.write(Path(name), which, 0), collection="work")
                Reader(llm, library).ask("What is it?", documents=[added], read="all", max_tokens=1).answer  # noqa: B018
        for number in range(n):
            if number % 8 == 0:  # a new one; then its damages add up
                shutil.rmtree(bad, ignore_errors=True)
                shutil.copytree(good, bad)
            try:
                _damage_once(rng, bad)
                _use_damaged(rng, llm, expected, bad, Path(name), counts)
            except Wrong as err:
                raise Wrong(f"round {number} of seed {seed}: {err}") from None
    return counts


def _damage_once(rng: random.Random, folder: Path) -> None:
    chunks = sorted(folder.glob("chunks/??/*.chunk"))
    path = folder / "index.sqlite3" if rng.random() < 0.2 or not chunks else rng.choice(chunks)
    with contextlib.suppress(FileNotFoundError):
        data = bytearray(path.read_bytes())
        how = rng.choice(("bit", "bytes", "zeros", "cut", "grown", "empty", "gone", "other", "moved"))
        at = rng.randrange(max(1, len(data)))
        if how == "bit" and data:
            data[at] ^= 1 << rng.randrange(8)
        elif how == "bytes":
            run = rng.randbytes(rng.randrange(1, 64))
            data[at : at + len(run)] = run
        elif how == "zeros":
            size = rng.randrange(1, 8192)
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif how == "cut":
            del data[at:]
        elif how == "grown":
            data += rng.randbytes(rng.randrange(1, 4096))
        elif how == "empty":
            data.clear()
        elif how == "other" and chunks and path in chunks:
            data = bytearray(rng.choice(chunks).read_bytes())
        elif how == "moved" and len(data) > 4096 * 4:
            data[4096:8192], data[8192:12288] = data[8192:12288], data[4096:8192]
        path.unlink()
        if how != "gone":
            path.write_bytes(data)
            old = time.time() + rng.choice((0, -(10**8), 10**8))  # a clock that jumped
            os.utime(path, (old, old))


def _use_damaged(
    rng: random.Random, llm: MesaLlama, expected: Expected, folder: Path, files: Path, counts: Counter[str]
) -> None:
    which, n = rng.randrange(N_DOCUMENTS), rng.randrange(6)
    for _ in range(3):
        try:
            with Library(folder, budget=BUDGET) as library:
                counts["the index was mended"] += library.mended is not None
                reader = Reader(llm, library)
                if rng.random() < 0.1:
                    library.verify()
                if f"{which}.txt" not in {document.name for document in library.documents()}:
                    counts["a document was added again"] += 1
                    library.add(expected.write(files, which, 0), collection="work")
                expected.ask(reader, library, which, 0, n)
                counts["answered"] += 1
                return
        except LibraryError as err:
            if "\n" in str(err):
                raise Wrong(f"more than a line: {err}") from None
            counts["an error"] += 1
            with contextlib.suppress(LibraryError), Library(folder, budget=BUDGET) as library:
                library.add(expected.write(files, which, 0))
        except (sqlite3.Error, OSError, ValueError, KeyError, TypeError, IndexError) as err:
            raise Wrong(f"{type(err).__name__}: {err}: {traceback.format_exc()}") from None
    counts["given up: the index was moved away"] += 1
    for path in folder.glob("index.sqlite3*"):
        path.unlink()


#
# full disks
#


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def disk(n: int, seed: int) -> Counter[str]:
    """Libraries on disks of a size that is too small, n of them: what is said, and that answers are right all the same."""
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    with contextlib.closing(open_model()) as llm, TemporaryDirectory() as name:
        expected = Expected(Path(name))
        for number in range(n):
            size = rng.randrange(200_000, 8_000_000)
            with small_disk(Path(name) / f"disk{number}", size) as mounted, contextlib.suppress(MesaError):
                _fill(llm, expected, mounted, Path(name), counts)
            if counts["wrong"]:
                raise Wrong(f"round {number} of seed {seed}")
    return counts


def _fill(llm: MesaLlama, expected: Expected, mounted: Path, files: Path, counts: Counter[str]) -> None:
    try:
        library = Library(mounted / "library", budget=BUDGET)
    except LibraryError:
        counts["no room for a library"] += 1
        raise
    with library:
        for which in range(N_DOCUMENTS):
            try:
                library.add(expected.write(files, which, 0))
            except LibraryError:
                counts["a document was refused"] += 1
                break
        there = library.documents()
        for document in there:
            which = int(document.name[0])
            try:
                expected.ask(Reader(llm, library), library, which, 0, 2)
                counts["answered"] += 1
            except LibraryError:
                counts["an error"] += 1
        if [document.name for document in library.documents()] != [document.name for document in there]:
            counts["wrong"] += 1


FAULTS: dict[str, Callable[[int, int], Counter[str]]] = {"kill": kill, "damage": damage, "disk": disk}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--n", type=int, default=100, help="rounds")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    counts = FAULTS[options.fault](options.n, options.seed)
    print(f"{options.fault}: {options.n} rounds in {time.perf_counter() - begin:.0f} s; {dict(counts)}")


if __name__ == "__main__":
    main()

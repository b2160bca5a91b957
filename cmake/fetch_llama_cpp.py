"""Put a (patched) llama.cpp source tree into the build tree. CMake runs this at configure time.

    fetch   llama-cpp-python's source distribution comes through pip, pinned by version and sha256
            (cmake/llama-cpp-python.txt), from whatever index the user's pip is configured for;
    take    the parts of vendor/llama.cpp that the library is built from, read straight out of the archive;
    patch   with patches/*.patch in order, strictly: every line that a hunk shows must be there, at the line that
            it says (in a local llama.cpp of another version: or at exactly one other), or the build stops;
    sync    to the destination by content: a file that did not change keeps its mtime, so that editing one
            patch recompiles only what that patch touches.

Standard library only, and pip for the download. No git and no patch(1): neither need exist on a user's machine.
(patch-ng was considered: it counts an already patched file as success, rewrites line ends and decodes new files.)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

# what libllama and libggml* are built from; tools, tests, models and the web UI stay in the archive
FILES = {"CMakeLists.txt", "LICENSE", "AUTHORS"}
FOLDERS = {"cmake", "ggml", "include", "licenses", "src", "vendor"}
TEST_FOLDERS = {"common", "models", "tests"}  # and what its own tests are built from and read

Tree = dict[str, bytes]  # path inside llama.cpp, with forward slashes -> contents


class BuildError(Exception):
    """Stops the build; its text is all that the user sees."""


def wanted(path: PurePosixPath, folders: set[str] = FOLDERS) -> bool:
    if not path.parts or ".." in path.parts or path.is_absolute():
        return False
    return path.parts[0] in folders if len(path.parts) > 1 else path.name in FILES


# ---------------------------------------------------------------------------------------------------- fetch


def read_pin(pin: Path) -> tuple[str, str]:
    """(version, sha256) from the requirements file."""
    match = re.search(r"^llama-cpp-python==(\S+)\s+--hash=sha256:([0-9a-f]{64})\s*$", pin.read_text(), re.MULTILINE)
    if not match:
        raise BuildError(f"{pin} must hold one line: llama-cpp-python==VERSION --hash=sha256:HEX")
    return match[1], match[2]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fetch_sdist(pin: Path, folder: Path) -> Path:
    """The source distribution, from `folder` when it is there already, else through pip."""
    version, expected = read_pin(pin)
    sdist = folder / f"llama_cpp_python-{version}.tar.gz"
    if sdist.is_file() and sha256(sdist) == expected:
        return sdist

    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching llama-cpp-python {version} (source distribution, for its llama.cpp) with pip", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "llama-cpp-python", "--require-hashes", "-r", str(pin), "-d", scratch]
        # note: CMAKE_ARGS and the like are meant for our own build, not for the metadata step of this download
        env = {k: v for k, v in os.environ.items() if k not in ("CMAKE_ARGS", "SKBUILD_CMAKE_ARGS")}
        done = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        )
        found = list(Path(scratch).glob("*.tar.gz"))
        if done.returncode or not found:
            raise BuildError(
                f"pip could not fetch llama-cpp-python {version} (sha256 {expected}).\n"
                "Configure pip's index (PIP_INDEX_URL, PIP_FIND_LINKS or pip.conf), or give a local llama.cpp with "
                f"-DMESA_LLAMA_CPP_SOURCE_DIR=DIR. pip said:\n{tail(done.stdout)}"
            )
        if (actual := sha256(found[0])) != expected:
            raise BuildError(f"llama-cpp-python {version}: sha256 is {actual}, expected {expected}")
        found[0].replace(sdist)
    return sdist


def tail(text: str, lines: int = 15) -> str:
    return "\n".join("  " + line for line in text.strip().splitlines()[-lines:])


# ----------------------------------------------------------------------------------------------------- take


def read_sdist(sdist: Path, folders: set[str] = FOLDERS) -> Tree:
    """llama.cpp out of the archive. Regular files only, by checked names: nothing is ever extracted in place."""
    tree: Tree = {}
    with tarfile.open(sdist, "r|gz") as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if not member.isfile() or name.parts[1:3] != ("vendor", "llama.cpp"):
                continue
            path = PurePosixPath(*name.parts[3:])
            if wanted(path, folders):
                file = archive.extractfile(member)
                assert file is not None  # a regular file
                tree[str(path)] = file.read()
    return tree


def read_checkout(folder: Path, folders: set[str] = FOLDERS) -> Tree:
    tree: Tree = {}
    for top in sorted(FILES | folders):
        start = folder / top
        for file in [start] if start.is_file() else sorted(start.rglob("*")):
            if file.is_file():
                tree[file.relative_to(folder).as_posix()] = file.read_bytes()
    return tree


# ---------------------------------------------------------------------------------------------------- patch


class Mismatch(Exception):
    pass


def apply_patch(tree: Tree, patch: bytes, exact: bool = True) -> None:
    """Apply one `git diff` to the tree; `exact`: hunks may not move. Raises Mismatch(file, reason), half-way."""
    lines = patch.splitlines(keepends=True)
    n = 0
    n_files = 0
    while n < len(lines):
        if lines[n].startswith((b"rename ", b"copy ", b"GIT binary", b"Binary files")):
            raise Mismatch("(patch)", "renames, copies and binary files are not supported")
        if not (lines[n].startswith(b"--- ") and n + 1 < len(lines) and lines[n + 1].startswith(b"+++ ")):
            n += 1
            continue
        old_name, new_name = side(lines[n], b"a/"), side(lines[n + 1], b"b/")
        name = old_name or new_name
        assert name
        n += 2
        n_files += 1

        if old_name is None:
            if name in tree:
                raise Mismatch(name, "the patch creates this file, but it is there already")
            old: list[bytes] = []
        elif old_name not in tree:
            raise Mismatch(name, "there is no such file")
        else:
            old = tree[old_name].splitlines(keepends=True)

        new: list[bytes] = []
        done = 0  # lines of `old` that are dealt with
        n_hunks = 0
        while n < len(lines) and (head := re.match(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", lines[n])):
            line_old, n_old, n_new = int(head[1]), int(head[2] or 1), int(head[4] or 1)
            before, after, n = read_hunk(lines, n + 1, n_old, n_new, name)
            start = find_hunk(old, before, line_old, done, name, exact)
            new += old[done:start] + after
            done = start + len(before)
            n_hunks += 1
        if not n_hunks:
            raise Mismatch(name, "the patch has no hunk for it")
        new += old[done:]

        if new_name is None:
            if new:
                raise Mismatch(name, "the patch deletes this file, but it holds more than the patch says")
            del tree[name]
        else:
            tree[new_name] = b"".join(new)
    if not n_files:
        raise Mismatch("(patch)", "it changes no file")


def side(line: bytes, prefix: bytes) -> str | None:
    """The file of a `--- a/FILE` or `+++ b/FILE` line; None for /dev/null."""
    name = line[4:].rstrip(b"\r\n").split(b"\t")[0]
    if name == b"/dev/null":
        return None
    path = PurePosixPath(name[2:].decode())
    if not name.startswith(prefix) or not wanted(path):
        raise Mismatch(name.decode(), "not a path that the build takes from llama.cpp (a/ and b/ prefixes expected)")
    return str(path)


def read_hunk(lines: list[bytes], n: int, n_old: int, n_new: int, name: str) -> tuple[list[bytes], list[bytes], int]:
    """(lines before, lines after, index of the line behind the hunk); the header's counts say where it ends."""
    before: list[bytes] = []
    after: list[bytes] = []
    last: list[list[bytes]] = []
    while n < len(lines):
        mark, body = lines[n][:1], lines[n][1:]
        if mark == b"\\":  # "\ No newline at end of file", about the line above
            for part in last:
                part[-1] = part[-1].rstrip(b"\r\n")
        elif len(before) == n_old and len(after) == n_new:
            break
        else:
            if mark in (b"\n", b"\r"):  # an editor stripped the space off an empty context line
                mark, body = b" ", lines[n]
            last = {b" ": [before, after], b"-": [before], b"+": [after]}.get(mark, [])
            if not last:
                break
            for part in last:
                part.append(body)
        n += 1
    if len(before) != n_old or len(after) != n_new:
        raise Mismatch(name, f"a hunk ends early, at line {n + 1} of the patch (its @@ line counts do not add up)")
    return before, after, n


def find_hunk(old: list[bytes], before: list[bytes], line: int, done: int, name: str, exact: bool) -> int:
    """Index in `old` at which `before` stands: where the patch says, or unless exact the only place that matches."""
    if not before:
        if old:
            raise Mismatch(name, f"the hunk at line {line} has no context; make the patch with git diff -U1 or more")
        return 0
    if line - 1 >= done and old[line - 1 : line - 1 + len(before)] == before:
        return line - 1
    places = [i for i in range(done, len(old) - len(before) + 1) if old[i : i + len(before)] == before]
    if len(places) == 1 and not exact:
        print(f"note: {name}: hunk of line {line} applied at line {places[0] + 1}", flush=True)
        return places[0]
    where = " or ".join(str(i + 1) for i in places[:3])
    found = f"are not there, but at line {where}" if places else "are not there"
    raise Mismatch(name, f"the lines that the hunk at line {line} expects {found}")


def apply_series(tree: Tree, patches: list[Path], exact: bool, version: str, origin: str) -> None:
    for patch in patches:
        try:
            apply_patch(tree, patch.read_bytes(), exact)
        except Mismatch as error:
            file, reason = error.args
            raise BuildError(
                f"patches/{patch.name} does not apply to {file} of llama.cpp: {reason}.\n"
                f"Expected: llama.cpp as shipped in llama-cpp-python {version}. Found: {origin}."
            ) from None


# ----------------------------------------------------------------------------------------------------- sync


def sync(tree: Tree, folder: Path) -> None:
    """Make `folder` hold exactly `tree`; files that are right already are not touched."""
    if folder.is_dir():
        for file in folder.rglob("*"):
            if file.is_file() and file.relative_to(folder).as_posix() not in tree:
                file.unlink()
    n_written = 0
    for name, data in tree.items():
        file = folder / name
        if file.is_file() and file.read_bytes() == data:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        n_written += 1
    print(f"llama.cpp sources: {len(tree)} files in {folder}, {n_written} written", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pin", type=Path, required=True, help="requirements file with version and hash")
    parser.add_argument("--download-dir", type=Path, required=True, help="where the source distribution is kept")
    parser.add_argument("--dest", type=Path, help="source tree to write; without it, only fetch")
    parser.add_argument("--patches", type=Path, help="folder of *.patch; without it, llama.cpp stays as it is")
    parser.add_argument("--source-dir", type=Path, help="a local llama.cpp instead of the download; never modified")
    parser.add_argument("--tests", action="store_true", help="take llama.cpp's own tests too")
    args = parser.parse_args()

    if not args.dest:
        print(fetch_sdist(args.pin, args.download_dir))
        return

    version, digest = read_pin(args.pin)
    patches = sorted(args.patches.glob("*.patch")) if args.patches else []
    folders = FOLDERS | TEST_FOLDERS if args.tests else FOLDERS
    key = json.dumps([sha256(Path(__file__)), digest, [[p.name, sha256(p)] for p in patches], sorted(folders)])
    stamp = args.dest.with_name(args.dest.name + ".stamp")
    # a local checkout may change under us, so it is read again each time
    if not args.source_dir and stamp.is_file() and stamp.read_text() == key and args.dest.is_dir():
        return

    if args.source_dir:
        tree, origin = read_checkout(args.source_dir, folders), str(args.source_dir)
    else:
        sdist = fetch_sdist(args.pin, args.download_dir)
        tree, origin = read_sdist(sdist, folders), f"llama-cpp-python {version}"
    if "CMakeLists.txt" not in tree or "include/llama.h" not in tree:
        raise BuildError(f"no llama.cpp in {args.source_dir or sdist}")
    apply_series(tree, patches, not args.source_dir, version, origin)
    stamp.unlink(missing_ok=True)
    sync(tree, args.dest)
    if not args.source_dir:
        stamp.write_text(key)


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(str(error))

"""What this process may use of the machine: memory and CPUs, within the limits of its control groups and its affinity; and which kernels.

Containers and batch systems set such limits. /proc/meminfo and os.cpu_count() tell of the machine and know nothing of them.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import ConfigError

if sys.platform != "win32":
    import resource

ROOT = Path("/")  # of /proc and /sys; another one in tests
MAX_THREADS = 512  # GGML_MAX_N_THREADS
LOOK = 0.1  # seconds: the kernel counts what is computed in steps of a hundredth
KERNELS = ("", "mesa", "stock")  # what MESA_KERNELS may be; csrc/mesa-kernels.cpp reads it


#
# control groups
#


def _read(path: Path) -> str:
    """A file of the kernel; "" if it is not there, or not for us."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(text: str) -> int | None:
    """The first number; None if there is none ("max": no limit)."""
    found = re.match(r"\s*(-?\d+)", text)
    return int(found[1]) if found else None


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """The folders of this process's control groups and of all their parents: (version of the interface, folder).

    Either version may have the controller, so both are walked. Where this process does not see its own folder, in a container
    whose /sys/fs/cgroup begins further down, the ones above it that it does see count.
    """
    mounts = []  # (version, what of the hierarchy is mounted, where)
    for line in _read(ROOT / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        inside, mount_point = (_unescape(field) for field in fields[3:5])
        if kind[0] == "cgroup2":
            mounts.append((2, inside, mount_point))
        elif kind[0] == "cgroup" and controller in kind[2].split(","):
            mounts.append((1, inside, mount_point))
    for line in _read(ROOT / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        places = [(inside, mount_point) for mounted, inside, mount_point in mounts if mounted == version]
        if not places:
            continue
        # note: a mount that begins elsewhere, where there is no other, is what a container sees of its own group
        inside, mount_point = next((place for place in places if _is_below(own, place[0])), places[0])
        top = ROOT / mount_point.lstrip("/")
        folder = top / os.path.relpath(own, inside) if _is_below(own, inside) else top
        for part in (folder, *folder.parents):
            yield version, part
            if part == top:
                break


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _unescape(field: str) -> str:
    r"""A path of mountinfo, in which blanks are written as \040."""
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), field)


#
# memory
#


# by version of the interface: files of limits, of what is used, and lines of memory.stat, groups below included
MEMORY = {
    1: (["memory.limit_in_bytes"], "memory.usage_in_bytes", ["total_active_file", "total_inactive_file"]),
    2: (["memory.max", "memory.high"], "memory.current", ["active_file", "inactive_file"]),
}


def available_memory() -> int | None:
    """Bytes of memory that this process could still use: what the machine has free, and what the limits of each control group that
    it is in leave. None where the system does not say.

    What files occupy of memory counts as free, as in MemAvailable: the kernel drops it, mapped weights included, where memory is
    needed.
    """
    free = []
    available = re.search(r"^MemAvailable:\s*(\d+) kB", _read(ROOT / "proc/meminfo"), re.MULTILINE)
    if available:
        free.append(int(available[1]) * 1024)
    for version, folder in _groups("memory"):
        limits, usage, files = MEMORY[version]
        used = _number(_read(folder / usage))
        statistics = dict(line.split(None, 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
        of_files = sum(_number(statistics.get(name, "")) or 0 for name in files)
        for limit in (_number(_read(folder / name)) for name in limits):
            if limit is not None and used is not None:
                free.append(max(0, limit - max(0, used - of_files)))
    return min(free, default=None)


#
# CPUs
#


def _quota() -> float | None:
    """How many CPUs' time the control groups allow; None without a limit."""
    quotas = []
    for version, folder in _groups("cpu"):
        if version == 2:
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        time, per = _number(quota), _number(period)
        if time is not None and time > 0 and per:
            quotas.append(time / per)
    return min(quotas, default=None)


def _affinity() -> set[int] | None:
    """The CPUs that this process may run on (cpusets included); None where the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _within_quota(n: int) -> int:
    """At most as many as the quota allows, whole ones: threads of ggml wait for each other, spinning, so one more than that costs time
    of the others while it is held back itself."""
    quota = _quota()
    return max(1, n if quota is None else min(n, int(quota)))


def usable_cpus() -> int:
    """How many logical CPUs this process may use: by affinity, cpuset and quota."""
    cpus = _affinity()
    return _within_quota((os.cpu_count() or 1) if cpus is None else len(cpus))


def usable_cores() -> int:
    """How many physical cores this process may use; on a Mac, fast ones."""
    cpus = _affinity()
    if cpus is None:
        found = _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")
        return _within_quota(found or os.cpu_count() or 1)
    cores = set()
    for cpu in cpus:
        topology = ROOT / f"sys/devices/system/cpu/cpu{cpu}/topology"
        # the second name is that of before Linux 5.4
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        cores.add(siblings.strip() or str(cpu))
    return _within_quota(len(cores))


def _sysctl(name: str) -> int | None:
    """A number that macOS tells by this name."""
    if sys.platform != "darwin":
        return None
    value, size, nothing = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int)), ctypes.c_size_t(0)
    sysctl = ctypes.CDLL(None).sysctlbyname
    failed = sysctl(name.encode(), ctypes.byref(value), ctypes.byref(size), None, nothing)
    return value.value if not failed and value.value > 0 else None


def disk_faults() -> int | None:
    """Pages that this process has waited for the disk for; None where the system does not tell."""
    return None if sys.platform == "win32" else resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class FreeCpus:
    """How many CPUs other programs leave to this process.

    Linux tells what all programs compute. Those that are niced make way, and do not count, unless this process is niced itself; or where Linux
    shares the CPUs among sessions first (autogroup, as on most desktops): one of another session makes no way, however niced.

    Attributes:
        n: CPUs, of those that this process may use, in the last period that was looked at; None: not known.
    """

    def __init__(self) -> None:
        self.n: float | None = None
        self._seen, self._looked = _computed(), time.perf_counter()

    def look(self) -> float | None:
        """The mean since the last look, where that is long enough ago; else what was seen then."""
        if time.perf_counter() - self._looked >= LOOK:
            before, self._seen, self.n = self._seen, _computed(), None
            self._looked = time.perf_counter()
            if before is not None and self._seen is not None:
                seconds, by_all, by_us = (now - then for now, then in zip(self._seen, before))
                n_cpus = len(_affinity() or ())
                self.n = min(max(0.0, n_cpus - max(0.0, by_all - by_us) / seconds), float(n_cpus))
        return self.n


def _computed() -> tuple[float, float, float] | None:
    """The time now, and seconds that were computed up to now on the CPUs that this process may use: by all programs, and by this process
    and its children. None where the system does not tell."""
    cpus = _affinity()
    if cpus is None:
        return None
    ticks = 0
    names = {f"cpu{cpu}" for cpu in cpus}
    by_session = _number(_read(ROOT / "proc/sys/kernel/sched_autogroup_enabled")) == 1
    niced = by_session or os.getpriority(os.PRIO_PROCESS, 0) > 0
    for line in _read(ROOT / "proc/stat").splitlines():
        name, *fields = line.split() or [""]
        if name in names and len(fields) >= 8:
            user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, fields[:8])
            ticks += user + niced * nice + system + irq + softirq + stolen
            names.discard(name)
    if names or not ticks:
        return None
    own = os.times()
    by_us = own.user + own.system + own.children_user + own.children_system
    return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), by_us


def default_threads() -> tuple[int, int]:
    """Threads for generating a token, and for reading a batch: (n_threads, n_threads_batch) of llama.cpp.

    A token is generated as fast as the weights come from memory, which one thread a core does; batches are computed, to which every
    logical CPU adds. `llama_cpp.Llama` takes half of the machine's CPUs and all of them, those of others included.
    """
    return min(usable_cores(), MAX_THREADS), min(usable_cpus(), MAX_THREADS)


#
# kernels
#


def check_kernels() -> None:
    """That the environment names kernels that there are: with another name the CPU backend takes this package's.

    Raises:
        ConfigError: it does not.
    """
    given = os.environ.get("MESA_KERNELS", "")
    if given not in KERNELS:
        raise ConfigError(
            f"MESA_KERNELS is {given!r} in the environment: set it to stock, for llama.cpp's own kernels, or to mesa, which is the default"
        )

"""What a process may use of its machine: made-up trees of /proc and /sys, and a process that really is held to one CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import BUNDLED, ModelPath, run_python
from mesa_gguf import ConfigError, MesaConfig, MesaLlama, OutOfMemoryError, machine
from mesa_gguf.machine import available_memory, default_threads, usable_cores, usable_cpus

GIB = 2**30
UNLIMITED = "9223372036854771712"  # what version 1 writes


Kernel = Callable[[dict[str, str]], None]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    """Makes the files that the kernel is asked for."""

    def make(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(machine, "ROOT", tmp_path)

    return make


def meminfo(available: int) -> dict[str, str]:
    return {
        "proc/meminfo": f"MemTotal:       65536000 kB\nMemFree:        1 kB\nMemAvailable:   {available // 1024} kB\nBuffers: 5 kB\n"
    }


def v2(own: str = "/", inside: str = "/", mount_point: str = "/sys/fs/cgroup") -> dict[str, str]:
    return {
        "proc/self/cgroup": f"0::{own}\n",
        "proc/self/mountinfo": "22 1 0:20 / / rw - ext4 /dev/root rw\n"
        f"30 22 0:26 {inside} {mount_point} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
    }


def v1(controller: str, own: str, inside: str = "/") -> dict[str, str]:
    return {
        "proc/self/cgroup": f"9:name=systemd:/\n4:{controller}:{own}\n0::/\n",
        "proc/self/mountinfo": f"35 30 0:31 {inside} /sys/fs/cgroup/{controller} rw - cgroup cgroup rw,{controller}\n",
    }


#
# memory
#


def test_the_memory_of_a_machine_without_limits(kernel: Kernel) -> None:
    kernel(meminfo(8 * GIB))
    assert available_memory() == 8 * GIB


def test_a_system_that_does_not_say(kernel: Kernel) -> None:
    kernel({})
    assert available_memory() is None


@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_a_limit_of_version_2(kernel: Kernel, name: str) -> None:
    other = {"memory.max": "memory.high", "memory.high": "memory.max"}[name]
    folder = "sys/fs/cgroup/app"
    files = meminfo(8 * GIB) | v2("/app")
    files |= {f"{folder}/{name}": f"{3 * GIB}\n", f"{folder}/{other}": "max\n", f"{folder}/memory.current": f"{GIB}\n"}
    kernel(files)
    assert available_memory() == 2 * GIB


def test_a_limit_of_a_parent(kernel: Kernel) -> None:
    """The tightest counts, with what its other children use."""
    files = meminfo(8 * GIB) | v2("/pod/app/inner")
    files |= {
        "sys/fs/cgroup/pod/memory.max": str(4 * GIB),
        "sys/fs/cgroup/pod/memory.current": str(3 * GIB),
        "sys/fs/cgroup/pod/app/memory.max": str(3 * GIB),
        "sys/fs/cgroup/pod/app/memory.current": str(GIB),
        "sys/fs/cgroup/pod/app/inner/memory.max": "max",
        "sys/fs/cgroup/pod/app/inner/memory.current": str(GIB),
    }
    kernel(files)
    assert available_memory() == GIB


def test_what_files_occupy_is_free(kernel: Kernel) -> None:
    """A model that was read before lies in the page cache, which counts as the group's."""
    files = meminfo(8 * GIB) | v2()
    files |= {
        "sys/fs/cgroup/memory.max": str(4 * GIB),
        "sys/fs/cgroup/memory.current": str(4 * GIB),
        "sys/fs/cgroup/memory.stat": f"anon {GIB}\nfile {3 * GIB}\ninactive_file {2 * GIB}\nactive_file {GIB}\nshmem 0\n",
    }
    kernel(files)
    assert available_memory() == 3 * GIB


def test_a_group_that_is_full(kernel: Kernel) -> None:
    files = meminfo(8 * GIB) | v2()
    files |= {"sys/fs/cgroup/memory.max": str(GIB), "sys/fs/cgroup/memory.current": str(GIB + 4096)}
    kernel(files)
    assert available_memory() == 0


def test_a_machine_with_less_than_the_limit(kernel: Kernel) -> None:
    files = meminfo(2 * GIB) | v2()
    files |= {"sys/fs/cgroup/memory.max": str(64 * GIB), "sys/fs/cgroup/memory.current": str(GIB)}
    kernel(files)
    assert available_memory() == 2 * GIB


def test_a_limit_of_version_1(kernel: Kernel) -> None:
    """Its parent has one, too, and the root none."""
    folder = "sys/fs/cgroup/memory"
    files = meminfo(8 * GIB) | v1("memory", "/docker/abc")
    files |= {
        f"{folder}/memory.limit_in_bytes": UNLIMITED,
        f"{folder}/memory.usage_in_bytes": str(30 * GIB),
        f"{folder}/docker/memory.limit_in_bytes": str(6 * GIB),
        f"{folder}/docker/memory.usage_in_bytes": str(2 * GIB),
        f"{folder}/docker/abc/memory.limit_in_bytes": str(4 * GIB),
        f"{folder}/docker/abc/memory.usage_in_bytes": str(2 * GIB),
        f"{folder}/docker/abc/memory.stat": f"cache 5\ninactive_file 1\ntotal_inactive_file {GIB // 2}\ntotal_active_file {GIB // 2}\n",
    }
    kernel(files)
    assert available_memory() == 3 * GIB


def test_a_container_that_sees_its_own_group_as_the_top(kernel: Kernel) -> None:
    """Without a namespace of control groups: /proc/self/cgroup has the path on the host, of which only the end is mounted."""
    folder = "sys/fs/cgroup/memory"
    files = meminfo(8 * GIB) | v1("memory", "/docker/abc", inside="/docker/abc")
    files |= {f"{folder}/memory.limit_in_bytes": str(2 * GIB), f"{folder}/memory.usage_in_bytes": str(GIB)}
    kernel(files)
    assert available_memory() == GIB


def test_a_mount_that_begins_elsewhere(kernel: Kernel) -> None:
    files = meminfo(8 * GIB) | v2("/somewhere", inside="/else", mount_point="/sys/fs/my\\040groups")
    files |= {"sys/fs/my groups/memory.max": str(2 * GIB), "sys/fs/my groups/memory.current": str(GIB)}
    kernel(files)
    assert available_memory() == GIB


def test_limits_that_make_no_sense_are_none(kernel: Kernel) -> None:
    files = meminfo(8 * GIB) | v2("/app")
    files["proc/self/mountinfo"] += "garbage\n1 2 3\n - \n"
    files |= {"sys/fs/cgroup/app/memory.max": "", "sys/fs/cgroup/app/memory.current": "what?"}
    files |= {"sys/fs/cgroup/memory.max": str(GIB)}  # and nothing of what is used
    kernel(files)
    assert available_memory() == 8 * GIB


@pytest.mark.parametrize("limit", [2**20, 2**10])
def test_a_kv_cache_beyond_the_limit_is_refused(
    model_path: ModelPath, monkeypatch: pytest.MonkeyPatch, kernel: Kernel, limit: int
) -> None:
    files = meminfo(64 * GIB) | v2() | {"sys/fs/cgroup/memory.max": str(limit), "sys/fs/cgroup/memory.current": "0"}
    kernel(files)
    with pytest.raises(OutOfMemoryError, match=r"GiB are free: make n_ctx \d+ or less"):
        MesaLlama(model_path("llama"), n_ctx=65536)


#
# CPUs
#


def cpus(monkeypatch: pytest.MonkeyPatch, allowed: set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def hyper_threads(n_cores: int, name: str = "core_cpus_list") -> dict[str, str]:
    """Core i has the CPUs i and i + n_cores."""
    return {
        f"sys/devices/system/cpu/cpu{cpu}/topology/{name}": f"{cpu % n_cores},{cpu % n_cores + n_cores}\n"
        for cpu in range(2 * n_cores)
    }


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_hyper_threads_read_but_do_not_generate(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, name: str) -> None:
    cpus(monkeypatch, set(range(16)))
    kernel(hyper_threads(8, name))
    assert default_threads() == (8, 16)


def test_affinity(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """Two threads of one core, and one of another."""
    cpus(monkeypatch, {0, 8, 1})
    kernel(hyper_threads(8))
    assert default_threads() == (2, 3)


def test_a_system_without_topology(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    cpus(monkeypatch, {3, 4, 5})
    kernel({})
    assert default_threads() == (3, 3)


def test_a_system_without_affinity(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    kernel({})
    assert usable_cpus() == 10
    monkeypatch.setattr(machine, "_sysctl", {"hw.perflevel0.physicalcpu": 6}.get)
    assert usable_cores() == 6
    monkeypatch.setattr(machine, "_sysctl", {"hw.physicalcpu": 8}.get)
    assert usable_cores() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.setattr(machine, "_sysctl", {}.get)
    assert default_threads() == (1, 1)


@pytest.mark.parametrize(
    ("quota", "threads"),
    [
        ("max 100000", (8, 16)),
        ("400000 100000", (4, 4)),
        ("1200000 100000", (8, 12)),
        ("250000 100000", (2, 2)),
        ("50000 100000", (1, 1)),
    ],
)
def test_a_quota_of_version_2(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, quota: str, threads: tuple[int, int]
) -> None:
    cpus(monkeypatch, set(range(16)))
    files = (
        hyper_threads(8) | v2("/a/b") | {"sys/fs/cgroup/a/cpu.max": quota, "sys/fs/cgroup/a/b/cpu.max": "max 100000"}
    )
    kernel(files)
    assert default_threads() == threads


@pytest.mark.parametrize(("quota", "threads"), [("-1", (8, 16)), ("300000", (3, 3))])
def test_a_quota_of_version_1(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, quota: str, threads: tuple[int, int]
) -> None:
    cpus(monkeypatch, set(range(16)))
    folder = "sys/fs/cgroup/cpu,cpuacct"
    files = hyper_threads(8) | v1("cpu,cpuacct", "/job")
    files |= {f"{folder}/job/cpu.cfs_quota_us": quota, f"{folder}/job/cpu.cfs_period_us": "100000"}
    kernel(files)
    assert default_threads() == threads


# note: in a process of its own, since affinity is the whole process's
AFFINITY = """
import os, sys
from mesa_gguf import MesaLlama, machine

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(*machine.default_threads())
llm = MesaLlama(sys.argv[1])
print(llm.n_threads, llm.n_threads_batch, llm.context_params.n_threads, llm.context_params.n_threads_batch)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_that_is_held_to_one_cpu() -> None:
    done = run_python(AFFINITY, str(BUNDLED))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["1 1", "1 1 1 1"]


def test_threads_of_a_model(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    cpus(monkeypatch, set(range(16)))
    kernel(hyper_threads(8) | meminfo(GIB))
    llm = MesaLlama(BUNDLED)
    assert (llm.n_threads, llm.n_threads_batch) == (8, 16)
    copy = llm.__getstate__()
    llm.close()
    assert (copy["n_threads"], copy["n_threads_batch"]) == (None, None)  # a copy elsewhere asks that machine
    llm = MesaLlama(BUNDLED, n_threads=3, n_threads_batch=None)
    assert (llm.n_threads, llm.n_threads_batch) == (3, 16)
    assert llm.__getstate__()["n_threads"] == 3
    llm.close()


@pytest.mark.parametrize("name", ["n_threads", "n_threads_batch"])
@pytest.mark.parametrize("value", [-1, 513, 2**31, 1.5, "2", True])
def test_numbers_of_threads_that_ggml_cannot_take(name: str, value: object) -> None:
    """More than GGML_MAX_N_THREADS, at which the process may end, or fewer than one, which it takes for 4."""
    with pytest.raises(ConfigError, match=rf"{name} is .*1 to 512, or None"):
        MesaLlama(BUNDLED, mesa=MesaConfig(), **{name: value})

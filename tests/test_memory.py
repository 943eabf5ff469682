"""How much memory is left: the machine's, or what the control groups of the process leave of it."""

import pytest
from fmedge_runtimes import memory

V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 1000 KiB free; its groups are put in by the tests, under the folder that it gives."""
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable:    1000 kB\n", "ascii")
    (tmp_path / "membership").write_text("0::/\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    return tmp_path


def group(folder, limit, used, stat=None, names=V2):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    if stat is not None:
        (folder / "memory.stat").write_text(f"anon 5\n{stat}\nfile 9\n")


def test_free_memory_is_the_machines_without_a_limit(machine):
    assert memory.available_bytes() == 1000 * 1024
    group(machine / "cgroup", "max", 10)
    assert memory.available_bytes() == 1000 * 1024


def test_free_memory_is_the_containers_where_that_is_less(machine):
    for limit, used, left in ((5000, 3000, 2000), (10**9, 3000, 1000 * 1024), (5000, 6000, 0)):
        group(machine / "cgroup", limit, used)
        assert memory.available_bytes() == left


def test_every_group_above_the_process_limits_it(machine):
    (machine / "membership").write_text("1:name=systemd:/other\n0::/system.slice/app.service\n")
    service = machine / "cgroup" / "system.slice" / "app.service"
    group(service, 9000, 1000)
    assert memory.available_bytes() == 8000
    group(service.parent, 9000, 4000)
    assert memory.available_bytes() == 5000
    group(service, 2000, 1000)
    assert memory.available_bytes() == 1000
    group(machine / "cgroup" / "other", 10, 0)
    assert memory.available_bytes() == 1000


def test_a_container_may_be_told_its_path_on_the_host(machine):
    for path in ("/docker/0123abcd", "/../../docker/0123abcd"):
        (machine / "membership").write_text(f"0::{path}\n")
        group(machine / "cgroup", 5000, 3000)
        assert memory.available_bytes() == 2000


def test_groups_of_version_1_limit_too(machine):
    (machine / "membership").write_text("5:cpu,cpuacct:/app\n4:memory:/app/worker\n")
    root = machine / "cgroup" / "memory"
    group(root, 2**63 - 4096, 10**6, names=V1)
    group(root / "app" / "worker", 7000, 3000, names=V1)
    assert memory.available_bytes() == 4000
    group(root / "app", 5000, 3000, names=V1)
    assert memory.available_bytes() == 2000
    group(machine / "cgroup" / "cpu,cpuacct" / "app", 1, 0, names=V1)
    assert memory.available_bytes() == 2000


@pytest.mark.parametrize("line", ["inactive_file 2500", "total_inactive_file 2500"])
def test_files_that_were_only_read_do_not_fill_a_group(machine, line):
    # The kernel gives their pages up at once; reading a bundle's weights must not leave no room for its cache.
    group(machine / "cgroup", 5000, 4900, line)
    assert memory.available_bytes() == 5000 - (4900 - 2500)


def test_memory_that_cannot_be_told_is_none(machine):
    (machine / "meminfo").write_text("MemTotal: 4000 kB\n")
    assert memory.available_bytes() is None
    (machine / "meminfo").unlink()
    (machine / "membership").unlink()
    assert memory.available_bytes() is None

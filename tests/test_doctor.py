"""`fmedge doctor` against file trees of boards, hostile files, and machines whose probes are answered by the test.

What this does not prove: that a real board has these files, or what its driver answers.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import device_trees
import jsonschema
import pytest
from device_trees import LIBRARIES, ORIN_JETPACK_7_2, ORIN_NANO_JETPACK_6_2, write_tree
from fmedge_runtimes.devices import GIB
from fmedge_runtimes.doctor import driver, machine, probe, report, software
from fmedge_runtimes.doctor.board import find_board, find_release
from fmedge_runtimes.doctor.fat_binary import Architectures, architectures
from fmedge_runtimes.doctor.file_tree import FileTree
from fmedge_runtimes.doctor.finding import Finding, Level
from fmedge_runtimes.doctor.machine import Machine, examine, version_of_number
from fmedge_runtimes.doctor.probe import Answer, ask
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fmedge.cli import app


def found(root: Path) -> dict[str, Finding]:
    return {f"{item.section}.{item.name}": item for item in report.report(examine(root))}


@dataclass(frozen=True)
class Expected:
    """What a tree must be told about: by finding, its level and words of its value or advice."""

    tree: str
    worst: Level
    findings: dict[str, tuple[Level, str]]
    silent: tuple[str, ...] = ()
    """Findings that must not be there."""


OLD = Level.PROBLEM
TREES = [
    Expected(
        "ORIN_NANO_JETPACK_6_2",
        Level.WARNING,
        {
            "machine.jetpack": (Level.OK, "6.2 (L4T 36.4.3: CUDA 12.6, TensorRT 10.3.0)"),
            "machine.target": (Level.OK, "orin-nano-8gb"),
            "machine.power mode": (Level.NOTE, "sudo nvpmodel -m 2 takes MAXN_SUPER"),
            "machine.clock": (Level.NOTE, "schedutil"),
            "memory.memory": (Level.OK, "5.2 GiB free of 7.4"),
            "memory.swap": (Level.WARNING, "1.2 GiB compressed"),  # compressed memory is no place for a build
            "tensorrt.library": (Level.OK, "10.3.0"),
            "tensorrt.bindings": (Level.OK, "10.3.0, the system's, for Python 3.10"),
        },
        silent=("gpu.driver files",),
    ),
    Expected("ORIN_NANO_JETPACK_6_2_1", Level.WARNING, {"machine.jetpack": (Level.OK, "6.2.1 (L4T 36.4.7")}),
    Expected(
        "ORIN_NX_JETPACK_6_1",
        Level.NOTE,
        {"machine.jetpack": (Level.OK, "6.1 (L4T 36.4.0"), "machine.target": (Level.OK, "orin-nx-16gb")},
    ),
    Expected(
        "ORIN_NANO_JETPACK_6_0",
        OLD,
        {"machine.jetpack": (OLD, "flash JetPack 6.2 or 7.2"), "tensorrt.library": (OLD, "10.3 or later")},
    ),
    Expected(
        "ORIN_NANO_JETPACK_5_1",
        OLD,
        {"machine.jetpack": (OLD, "flash JetPack 6.2 or 7.2"), "tensorrt.bindings": (Level.WARNING, "Python 3.8")},
    ),
    Expected("XAVIER_JETPACK_5_1", OLD, {"machine.jetpack": (OLD, "this board gets no TensorRT 10")}),
    Expected("NANO_JETPACK_4", OLD, {"machine.jetpack": (OLD, "--target cpu"), "tensorrt.library": (OLD, "8.2.1")}),
    Expected(
        "THOR_JETPACK_7_0",
        Level.OK,
        {
            "machine.jetpack": (Level.OK, "7.0 (L4T 38.2.0"),
            "machine.target": (Level.OK, "thor-jp7.0"),
            "tensorrt.library": (Level.OK, "10.13.3"),
        },
        silent=("tensorrt.dla", "gpu.driver files"),
    ),
    Expected("THOR_JETPACK_7_1", Level.OK, {"machine.target": (Level.OK, "thor-jp7.0")}),
    Expected(
        "THOR_JETPACK_7_2",
        Level.OK,
        {"machine.jetpack": (Level.OK, "7.2.1 (L4T 39.2.1"), "machine.target": (Level.OK, "thor")},
    ),
    Expected(
        "ORIN_JETPACK_7_2",
        Level.OK,
        {
            "machine.jetpack": (Level.OK, "7.2 (L4T 39.2.0"),
            "machine.target": (Level.OK, "agx-orin-64gb-jp7.2"),
            "machine.power mode": (Level.OK, "MAXN"),
            "tensorrt.bindings": (Level.OK, "10.16.2.10, the system's, for Python 3.12"),
        },
        silent=("tensorrt.dla",),
    ),
    Expected("ORIN_WITH_BINDINGS_OF_11", OLD, {"tensorrt.bindings": (OLD, "apt install python3-libnvinfer=VERSION")}),
    Expected(
        "CONTAINER_ON_ORIN",
        Level.WARNING,
        {
            "machine.board": (Level.OK, "NVIDIA Jetson Orin Nano"),
            "machine.target": (Level.OK, "orin-nano-8gb"),
            "machine.container": (Level.NOTE, "--runtime nvidia"),
        },
    ),
    Expected(
        "CONTAINER_WITHOUT_RUNTIME",
        Level.WARNING,
        {
            "machine.jetpack": (Level.WARNING, "mount /etc/nv_tegra_release"),
            "machine.container": (Level.NOTE, "--runtime nvidia"),
            "tensorrt.dla": (Level.WARNING, "libnvdla_compiler.so is missing"),
        },
    ),
    Expected(
        "DESKTOP",
        Level.WARNING,
        {"gpu.cuda": (Level.OK, "13.0.2"), "tensorrt.library": (Level.OK, "10.16.1")},
        silent=("machine.board",),
    ),
    Expected("DESKTOP_WITHOUT_TOOLKIT", Level.NOTE, {}, silent=("gpu.cuda", "gpu.driver files")),
    Expected("DESKTOP_BEFORE_REBOOT", OLD, {"gpu.driver files": (OLD, "reboot")}),
    Expected("DESKTOP_WITH_TWO_TOOLKITS", Level.WARNING, {"gpu.cuda": (Level.OK, "13.0.2 (also installed: 12.6)")}),
    Expected("WSL_2", Level.NOTE, {"machine.wsl": (Level.NOTE, "Windows")}, silent=("gpu.driver files",)),
    Expected(
        "GRACE_SERVER",
        Level.OK,
        {"tensorrt.bindings": (Level.OK, "Python 3.12")},
        silent=("machine.board", "machine.target", "tensorrt.dla"),
    ),
    Expected("RASPBERRY_PI", Level.NOTE, {"memory.swap": (Level.OK, "0.5 GiB on disk")}, silent=("machine.board",)),
    Expected("WITHOUT_PROC", Level.NOTE, {}, silent=("machine.board", "memory.memory", "memory.swap")),
]


@pytest.mark.parametrize("expected", TREES, ids=lambda expected: expected.tree)
def test_trees(tmp_path: Path, expected: Expected) -> None:
    facts = found(write_tree(tmp_path, getattr(device_trees, expected.tree)))
    for name, (level, words) in expected.findings.items():
        item = facts[name]
        assert item.level == level and words in f"{item.value} -> {item.advice}", item
    assert not set(expected.silent) & set(facts)
    assert max(item.level for item in facts.values()) == expected.worst
    assert all(item.advice for item in facts.values() if item.level > Level.NOTE), "a warning says what to do"


def test_every_tree_is_expected() -> None:
    trees = {name for name, value in vars(device_trees).items() if name.isupper() and isinstance(value, dict)}
    assert trees == {expected.tree for expected in TREES}


def test_the_power_mode_of_the_first_boot(tmp_path: Path) -> None:
    files = dict(ORIN_NANO_JETPACK_6_2)
    del files["var/lib/nvpmodel/status"]
    item = found(write_tree(tmp_path, files))["machine.power mode"]
    assert (item.value, item.level) == ("25W", Level.NOTE)
    item = found(write_tree(tmp_path, {**files, "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n"}))[
        "machine.power mode"
    ]
    assert (item.value, item.level, item.advice) == ("MAXN_SUPER", Level.OK, "")


def test_a_newer_tensorrt_than_jetpack_s(tmp_path: Path) -> None:
    """A container may bring its own."""
    files = {
        **ORIN_NANO_JETPACK_6_2,
        "etc/nv_tegra_release": device_trees.ORIN_NANO_JETPACK_6_0["etc/nv_tegra_release"],
    }
    assert found(write_tree(tmp_path, files))["machine.jetpack"].level == Level.OK


def test_links_lead_through_the_recorded_files(tmp_path: Path) -> None:
    """Not through this machine's: JetPack's /usr/local/cuda is a link to /etc/alternatives/cuda."""
    outside = tmp_path / "outside"
    root = write_tree(tmp_path / "tree", {"usr/local/cuda-12.6/version.json": device_trees.cuda("12.6.11")})
    write_tree(outside, {"version.json": device_trees.cuda("99.9")})
    (root / "etc/alternatives").mkdir(parents=True)
    (root / "etc/alternatives/cuda").symlink_to("/usr/local/cuda-12.6")
    (root / "usr/local/cuda").symlink_to("/etc/alternatives/cuda")
    assert found(root)["gpu.cuda"].value == "12.6.11"
    (root / "etc/alternatives/cuda").unlink()
    (root / "etc/alternatives/cuda").symlink_to(outside)  # an absolute path, of a folder that this machine has
    assert "gpu.cuda" not in found(root)
    (root / "etc/alternatives/cuda").unlink()
    (root / "etc/alternatives/cuda").symlink_to("../../../../../usr/local/cuda-12.6")  # / has no parent
    assert found(root)["gpu.cuda"].value == "12.6.11"


def test_releases() -> None:
    named = {
        l4t: row.jetpack for l4t in ("36.4.7", "36.4.4", "36.5.0", "38.4.0", "35.6.1") if (row := find_release(l4t))
    }
    assert named == {"36.4.7": "6.2.1", "36.4.4": "6.2.1", "36.5.0": "6.2.2", "38.4.0": "7.1", "35.6.1": "5.1"}
    assert find_release("40.1.0") is None and find_release("") is None


def test_an_unknown_release_says_so(tmp_path: Path) -> None:
    text = "# R47 (release), REVISION: 1.0\n"
    item = found(write_tree(tmp_path, {**ORIN_JETPACK_7_2, "etc/nv_tegra_release": text}))["machine.jetpack"]
    assert (item.value, item.level) == ("unknown: L4T 47.1.0", Level.WARNING)


SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["worst", "findings"],
    "properties": {
        "worst": {"enum": ["ok", "note", "warning", "problem"]},
        "findings": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["section", "name", "value", "level", "advice"],
                "properties": {
                    **{key: {"type": "string"} for key in ("advice",)},
                    **{key: {"type": "string", "minLength": 1} for key in ("section", "name", "value")},
                    "level": {"enum": ["ok", "note", "warning", "problem"]},
                },
            },
        },
    },
}


def assert_reported(root: Path) -> None:
    """Both forms of the command's answer: it ends with 0 or 1, JSON is of the schema, text is one line a finding."""
    shown = run("--root", str(root), "--json")
    assert shown.exit_code in (0, 1), shown.exception
    record = json.loads(shown.output)
    jsonschema.validate(record, SCHEMA)
    lines = run("--root", str(root)).output.splitlines()
    advices = sum(bool(item["advice"]) for item in record["findings"])
    sections = len({item["section"] for item in record["findings"]})
    assert len(lines) == len(record["findings"]) + advices + sections


WHOLE = {
    **ORIN_NANO_JETPACK_6_2,
    **device_trees.CONTAINER_ON_ORIN,
    **device_trees.WSL_2,
    "proc/1/cgroup": "0::/\n",
    "usr/local/cuda-12.6/x": "",
}
"""Every file that is read, somewhere."""
LONG = "9" * 5000
"""More digits than Python turns into a number."""
PIECES = st.sampled_from(
    [
        LONG,
        f"# R{LONG} (release), REVISION: {LONG}",
        f"# R36 (release), REVISION: 4.{LONG}",
        f"MemTotal: {LONG} kB\nMemAvailable: {LONG} kB\n",
        f"x\nx x {LONG}\n",
        f"pmode:{LONG}",
        "< PM_CONFIG DEFAULT=1 >< POWER_MODEL ID=1 NAME=\x1b[31m >",
        '{"cuda": {"version": []}}',
        f'{{"cuda": {{"version": "{LONG}"}}}}',
        "[" * 100_000,
        f"NVRM version: Kernel Module  {LONG}.{LONG}",
        "\x1b[2J\x07\r\n",
        "\u0663\u0664",  # digits, but not ASCII's
        "nvidia,tegra234\0",
    ]
).map(str.encode)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(WHOLE)), st.binary(max_size=200) | PIECES, min_size=1))
def test_files_with_anything_in_them_are_never_an_error(tmp_path_factory: pytest.TempPathFactory, files: Any) -> None:
    root = write_tree(tmp_path_factory.mktemp("tree"), WHOLE)
    for name, content in files.items():
        (root / name).write_bytes(content)
    for item in report.report(examine(root)):
        assert item.section and item.name and item.value, item
        assert (item.value + item.advice).isprintable(), item


def test_folders_pipes_and_loops_in_place_of_files(tmp_path: Path) -> None:
    for name in WHOLE:
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "loops" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "loops" / name).symlink_to(Path(name).name)
        (tmp_path / "pipes" / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / "pipes" / name)
        path = tmp_path / "closed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "folders" / LIBRARIES / "loop").symlink_to(tmp_path / "folders" / LIBRARIES)
    (tmp_path / "loops/usr/local").rename(tmp_path / "loops/usr/local-before")
    (tmp_path / "loops/usr/local").symlink_to("local")
    for path in (tmp_path / "closed").rglob("*"):
        path.chmod(0)
    for name in ("folders", "loops", "pipes", "closed"):
        assert_reported(tmp_path / name)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    root = write_tree(tmp_path, ORIN_NANO_JETPACK_6_2)
    for name in (
        b"libnvinfer.so.10.\xff",
        b"libnvinfer.so.10.3.0.old",
        b"libcudnn.so." + b"9" * 200,
        b"libcuda.so.\n1",
    ):
        (root / LIBRARIES / os.fsdecode(name)).write_text("")
    packages = root / "usr/lib/python3.10/dist-packages"
    (packages / os.fsdecode(b"tensorrt-\xff.dist-info")).mkdir()
    assert_reported(root)


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    root = write_tree(tmp_path, ORIN_NANO_JETPACK_6_2)
    with (root / "proc/device-tree/model").open("r+b") as file:
        file.truncate(1 << 40)  # a hole: it takes no disk
    assert_reported(root)


def test_an_empty_tree(tmp_path: Path) -> None:
    assert find_board(FileTree(tmp_path)) is None
    assert report.report(examine(tmp_path))


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("print(5)", "it said '5'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it crashed (SIGSEGV)"),
        ("raise SystemExit('there is no driver')", "there is no driver"),
        ("print('hello')", "it said 'hello'"),
        ("import sys; sys.exit(3)", "it ended with 3"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    ],
)
def test_probes_cannot_hurt(program: str, problem: str) -> None:
    assert ask(program) == Answer(None, problem)


def test_a_probe_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SECONDS", 0.3)
    assert "no answer" in ask("import time; time.sleep(30)").problem


def test_versions_of_numbers() -> None:
    assert [version_of_number(number) for number in (8601, 100300, 101602, 110401)] == [
        "8.6.1",
        "10.3.0",
        "10.16.2",
        "11.4.1",
    ]


def fat_binary(entries: list[tuple[int, int]]) -> bytes:
    body = b""
    for kind, architecture in entries:
        payload = b"\x7fELF" + bytes(60)
        head = struct.pack("<HHIQ", kind, 0x101, 64, len(payload)) + bytes(12) + struct.pack("<I", architecture)
        body += head.ljust(64, b"\0") + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_code_in_a_library(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(
        bytes(100) + fat_binary([(2, 75), (2, 87)]) + bytes(33) + fat_binary([(1, 90)]) + b"\x50\xed\x55\xba"
    )
    assert architectures(path) == Architectures(frozenset({75, 87}), frozenset({90}))


@pytest.mark.parametrize(
    ("capability", "serves"), [("8.7", True), ("8.6", False), ("8.9", True), ("11.0", True), ("7.0", False)]
)
def test_which_gpus_code_serves(capability: str, serves: bool) -> None:
    assert Architectures(frozenset({75, 87}), frozenset({90})).serve(capability) is serves


def test_code_in_a_real_library() -> None:
    found = pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="fmedge[rtx] is not installed")
    code = architectures(next(Path(found.__file__).parent.glob("libtensorrt_rtx.so.1.*")))
    assert {75, 80, 86, 120} <= code.machine_code
    assert not Architectures(code.machine_code, frozenset()).serve("5.0")


GPU = {"name": "Orin", "capability": "8.7", "memory": 8 * GIB, "integrated": True}


def live(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Answer], installed: dict[str, str]) -> dict[str, Finding]:
    """The report on this machine, had its probes answered so."""
    asked: dict[str, Answer] = {probe.GPUS: Answer({"cuda": "12.6", "gpus": [GPU]}), **answers}
    monkeypatch.setattr(machine, "ask", lambda program, *_: asked.get(program, Answer(None, "not asked")))
    monkeypatch.setattr(machine, "packages", lambda: installed)
    return {f"{item.section}.{item.name}": item for item in report.report(examine())}


CUDA = Answer({"version": "1.31.1", "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]})


def test_a_provider_without_code_for_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libonnxruntime_providers_cuda.so"
    path.write_bytes(fat_binary([(2, 89), (2, 90), (2, 120)]))
    monkeypatch.setattr(report, "provider_library", lambda _: path)
    facts = live(monkeypatch, {probe.ONNXRUNTIME: CUDA}, {"onnxruntime-gpu": "1.31.1"})
    assert facts["onnxruntime.cuda"].level == Level.PROBLEM
    assert "has code for 8.9, 9.0, 12.0, and the GPU is 8.7" in facts["onnxruntime.cuda"].value
    path.write_bytes(fat_binary([(2, 87)]))
    assert live(monkeypatch, {probe.ONNXRUNTIME: CUDA}, {})["onnxruntime.cuda"].level == Level.OK


@pytest.mark.parametrize(
    ("problem", "level", "words"),
    [
        ("there is no NVIDIA driver (libcuda.so.1: cannot open)", Level.NOTE, ""),
        ("cuInit failed: CUDA_ERROR_NO_DEVICE", Level.WARNING, "CUDA_VISIBLE_DEVICES"),
        ("cuInit failed: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", Level.WARNING, "reboot"),
        ("cuInit failed: CUDA_ERROR_OPERATING_SYSTEM", Level.WARNING, "video,render"),
        ("cuInit failed: CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", Level.WARNING, "cuda-compat"),
    ],
)
def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, problem: str, level: Level, words: str) -> None:
    monkeypatch.setattr(driver, "kernel_version", lambda _: None)
    item = live(monkeypatch, {probe.GPUS: Answer(None, problem)}, {})["gpu.driver"]
    assert (item.level, words in item.advice, bool(item.advice)) == (level, True, bool(words))
    # With the kernel's half of a driver it is expected to work.
    monkeypatch.setattr(driver, "kernel_version", lambda _: "580.95.05")
    item = live(monkeypatch, {probe.GPUS: Answer(None, problem)}, {})["gpu.driver"]
    assert item.level == Level.PROBLEM and item.advice


def test_a_driver_older_than_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cuda_version", lambda *_: "13.0.2")
    facts = live(monkeypatch, {}, {"cuda-bindings": "13.4.4"})
    assert facts["gpu.cuda"].level == Level.WARNING and "the driver is for CUDA 12" in facts["gpu.cuda"].value
    assert facts["gpu.cuda-bindings"].level == Level.PROBLEM
    assert facts["gpu.cuda-bindings"].advice == "pip install 'cuda-bindings<13'"
    assert "gpu.cuda-bindings" not in live(monkeypatch, {}, {"cuda-bindings": "12.9.4"})


def test_a_folder_beside_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor is a file: probes run with the current directory's sources out of sight."""
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    assert ask(probe.BINDINGS).problem.startswith("ModuleNotFoundError: No module named 'tensorrt'")


def test_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = true\n")
    assert software.find_environment() == f"virtual, {tmp_path}: the system's packages are seen"
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = false\n")
    assert software.find_environment() == f"virtual, {tmp_path}: the system's packages are hidden"
    (tmp_path / "conda-meta").mkdir()
    assert software.find_environment().startswith("conda")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libnvinfer.so.10.3.0").write_text("")
    found = software.find_library(FileTree(tmp_path / "nothing"), "libnvinfer", software.own_folders())
    assert found == software.Library(tmp_path / "lib/libnvinfer.so.10.3.0", "10.3.0")


def test_two_packages_of_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = live(monkeypatch, {}, {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"})
    assert facts["onnxruntime.packages"].level == Level.PROBLEM


def library(monkeypatch: pytest.MonkeyPatch) -> None:
    found = software.Library(Path("/usr/lib/libnvinfer.so.10.3.0"), "10.3.0")
    monkeypatch.setattr(machine, "find_library", lambda _, name, __: found if name == "libnvinfer" else None)


def test_bindings_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch)
    answers = {
        probe.TENSORRT_LIBRARY: Answer({"number": 100300}),
        probe.BINDINGS: Answer({"version": "10.16.1.11", "file": "tensorrt/__init__.py"}),
    }
    item = live(monkeypatch, answers, {})["tensorrt.bindings"]
    assert item.level == Level.PROBLEM and "the library is 10.3.0" in item.value
    answers[probe.BINDINGS] = Answer({"version": "10.3.0", "file": "tensorrt/__init__.py"})
    assert live(monkeypatch, answers, {})["tensorrt.bindings"].level == Level.OK


@pytest.mark.parametrize(
    ("python", "words"),
    [("3.11", "/usr/bin/python3 -m venv"), ("3.10", "/usr/bin/python3.10 -m venv"), ("3", "/usr/bin/python3 -m venv")],
)
def test_bindings_that_are_the_systems(monkeypatch: pytest.MonkeyPatch, python: str, words: str) -> None:
    library(monkeypatch)
    monkeypatch.setattr(machine, "system_bindings", lambda _: {python: "10.3.0"})
    monkeypatch.setattr(machine.sys, "version_info", (3, 11, 9, "final", 0))
    item = live(monkeypatch, {probe.TENSORRT_LIBRARY: Answer({"number": 100300})}, {})["tensorrt.bindings"]
    assert item.level == Level.WARNING and words in item.advice


def test_a_library_that_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch)
    facts = live(monkeypatch, {probe.TENSORRT_LIBRARY: Answer(None, "it crashed (SIGSEGV)")}, {})
    assert facts["tensorrt.library"].level == Level.PROBLEM
    assert "does not load: it crashed (SIGSEGV)" in facts["tensorrt.library"].value


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_the_command(tmp_path: Path) -> None:
    shown = run("--root", str(write_tree(tmp_path, ORIN_NANO_JETPACK_6_2)))
    assert shown.exit_code == 0
    assert "fmedge export MODEL BUNDLE --target orin-nano-8gb" in shown.output
    record = json.loads(run("--root", str(tmp_path), "--json").output)
    assert record["worst"] == "warning"
    assert {"section", "name", "value", "level", "advice"} == set(record["findings"][0])


def test_the_command_exits_with_1_for_a_problem(tmp_path: Path) -> None:
    files = {**ORIN_NANO_JETPACK_6_2, "etc/nv_tegra_release": "# R35 (release), REVISION: 6.1, GCID: 1\n"}
    files = {name: text for name, text in files.items() if "nvinfer" not in name}
    assert run("--root", str(write_tree(tmp_path, files))).exit_code == 1


def test_this_machine_is_examined(bundle: Path) -> None:
    record = json.loads(run(str(bundle), "--json").output)
    facts = {f"{item['section']}.{item['name']}": item for item in record["findings"]}
    assert facts["bundle.exported for"]["value"].startswith("cpu")
    assert facts["bundle.on the CPU"]["value"] == "yes"
    assert facts["onnxruntime.onnxruntime"]["level"] == "ok"


def test_a_folder_that_is_no_bundle_is_a_finding(tmp_path: Path) -> None:
    shown = run(str(tmp_path), "--root", str(tmp_path), "--json")
    item = json.loads(shown.output)["findings"][-1]
    assert (item["section"], item["level"], shown.exit_code) == ("bundle", "problem", 1)


def test_a_machine_is_described_without_its_probes(tmp_path: Path) -> None:
    seen = examine(write_tree(tmp_path, ORIN_NANO_JETPACK_6_2))
    assert isinstance(seen, Machine) and seen.capability == "8.7" and seen.providers == []

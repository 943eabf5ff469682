"""`fmedge doctor` against file trees of boards, hostile files, and machines whose probes are answered by the test.

What this does not prove: that a real board has these files, or what its driver answers.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import device_trees
import pytest
from device_trees import DESKTOP, LIBRARIES, ORIN_JETPACK_7_2, ORIN_NANO_JETPACK_6_2, THOR_JETPACK_7_0, write_tree
from fmedge_runtimes.devices import GIB
from fmedge_runtimes.doctor import machine, probe, report, software
from fmedge_runtimes.doctor.board import find_board, find_release
from fmedge_runtimes.doctor.fat_binary import Architectures, architectures
from fmedge_runtimes.doctor.file_tree import FileTree
from fmedge_runtimes.doctor.finding import Finding, Level
from fmedge_runtimes.doctor.machine import Machine, examine, version_of_number
from fmedge_runtimes.doctor.probe import Answer, ask
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fmedge.cli import app


def found(root: Path) -> dict[str, Finding]:
    return {f"{item.section}.{item.name}": item for item in report.report(examine(root))}


@pytest.mark.parametrize(
    ("files", "jetpack", "target", "tensorrt"),
    [
        (ORIN_NANO_JETPACK_6_2, "6.2 (L4T 36.4.3", "orin-nano-8gb", "10.3.0"),
        (THOR_JETPACK_7_0, "7.0 (L4T 38.2.0", "thor-jp7.0", "10.13.3"),
        (ORIN_JETPACK_7_2, "7.2 (L4T 39.2.0", "agx-orin-64gb-jp7.2", "10.16.2"),
    ],
)
def test_boards(tmp_path: Path, files: dict[str, str], jetpack: str, target: str, tensorrt: str) -> None:
    facts = found(write_tree(tmp_path, files))
    assert facts["machine.jetpack"].value.startswith(jetpack)
    assert facts["machine.target"].value == target
    assert facts["tensorrt.library"].value.startswith(tensorrt)
    assert max(item.level for item in facts.values()) < Level.PROBLEM


def test_a_small_board_on_jetpack_6(tmp_path: Path) -> None:
    facts = found(write_tree(tmp_path, ORIN_NANO_JETPACK_6_2))
    assert facts["machine.power mode"].value == "MAXN_SUPER"
    assert facts["memory.memory"].value == "5.2 GiB free of 7.4"
    assert facts["memory.swap"].level == Level.WARNING  # compressed memory is no place for a build
    assert "Python 3.10" in facts["tensorrt.bindings"].value
    assert facts["tensorrt.bindings"].level == Level.WARNING
    assert facts["machine.clock"].level == Level.NOTE


def test_bindings_for_a_python_that_fmedge_runs_on(tmp_path: Path) -> None:
    item = found(write_tree(tmp_path, ORIN_JETPACK_7_2))["tensorrt.bindings"]
    assert (item.value, item.level) == ("10.16.2.10, the system's, for Python 3.12", Level.OK)


def test_a_desktop_is_no_board(tmp_path: Path) -> None:
    facts = found(write_tree(tmp_path, DESKTOP))
    assert "machine.board" not in facts
    assert facts["gpu.cuda"].value == "13.0.2"
    assert facts["tensorrt.library"].value.startswith("10.16.1")


def test_a_container_of_another_jetpack(tmp_path: Path) -> None:
    files = dict(ORIN_NANO_JETPACK_6_2)
    del files[f"{LIBRARIES}/nvidia/libnvdla_compiler.so"], files["etc/nv_tegra_release"]
    facts = found(write_tree(tmp_path, {**files, ".dockerenv": ""}))
    assert "--runtime nvidia" in facts["machine.container"].advice
    assert "libnvdla_compiler.so is missing" in facts["tensorrt.dla"].value
    assert facts["machine.jetpack"].level == Level.WARNING


def test_software_that_is_too_old(tmp_path: Path) -> None:
    files = dict(ORIN_NANO_JETPACK_6_2)
    files["etc/nv_tegra_release"] = files["etc/nv_tegra_release"].replace("REVISION: 4.3", "REVISION: 3.0")
    for name in ("libnvinfer.so.10", "libnvinfer.so.10.3.0"):
        del files[f"{LIBRARIES}/{name}"]
    files[f"{LIBRARIES}/libnvinfer.so.8.6.2"] = ""
    facts = found(write_tree(tmp_path, files))
    assert facts["machine.jetpack"].level == facts["tensorrt.library"].level == Level.PROBLEM
    assert "JetPack 6.1 or later" in facts["machine.jetpack"].advice


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


@given(st.dictionaries(st.sampled_from(sorted(ORIN_NANO_JETPACK_6_2)), st.binary(max_size=200), min_size=1))
def test_files_with_anything_in_them_are_never_an_error(tmp_path_factory: pytest.TempPathFactory, files: Any) -> None:
    root = write_tree(tmp_path_factory.mktemp("tree"), ORIN_NANO_JETPACK_6_2)
    for name, content in files.items():
        (root / name).write_bytes(content)
    assert report.report(examine(root))


def test_folders_and_loops_in_place_of_files(tmp_path: Path) -> None:
    for name in ORIN_NANO_JETPACK_6_2:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / LIBRARIES / "loop").symlink_to(tmp_path / LIBRARIES)
    (tmp_path / "proc/self").symlink_to("self")
    assert report.report(examine(tmp_path))


def test_an_empty_tree(tmp_path: Path) -> None:
    assert find_board(FileTree(tmp_path)) is None
    assert report.report(examine(tmp_path))


@pytest.mark.parametrize(
    ("program", "problem"),
    [
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
    ("python", "words"), [("3.11", "--system-site-packages"), ("3.9", "TensorRT for another Python")]
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
    assert run("--root", str(write_tree(tmp_path, files))).exit_code == 1


def test_this_machine_is_examined(bundle: Path) -> None:
    record = json.loads(run(str(bundle), "--json").output)
    facts = {f"{item['section']}.{item['name']}": item for item in record["findings"]}
    assert facts["bundle.exported for"]["value"].startswith("cpu")
    assert facts["bundle.on the CPU"]["value"] == "yes"
    assert facts["onnxruntime.onnxruntime"]["level"] == "ok"


def test_every_tree_names_a_target_that_export_knows(tmp_path: Path) -> None:
    from fmedge_runtimes.devices import DEVICES

    trees = [value for name, value in vars(device_trees).items() if name.isupper() and isinstance(value, dict)]
    assert len(trees) == 4
    for number, files in enumerate(trees):
        tree = FileTree(write_tree(tmp_path / str(number), files))
        board = find_board(tree)
        if board is not None:
            assert board.target(None) in DEVICES


def test_a_machine_is_described_without_its_probes(tmp_path: Path) -> None:
    seen = examine(write_tree(tmp_path, ORIN_NANO_JETPACK_6_2))
    assert isinstance(seen, Machine) and seen.capability == "8.7" and seen.providers == []

"""docs/device.md: what can run here runs, and what cannot names options and files that exist."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from fmedge_runtimes.devices import DEVICES
from typer.testing import CliRunner

from fmedge.cli import app

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "device.md").read_text("utf-8")
RUN = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def extras() -> list[str]:
    """Those of pyproject.toml. tomllib is Python 3.11's, and this page is read by 3.10, too."""
    section = (ROOT / "pyproject.toml").read_text("utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
    return re.findall(r"^(\w+) = \[", section, re.MULTILINE)


def test_there_are_commands_that_run() -> None:
    assert len(RUN) >= 5
    assert all(line.startswith("fmedge ") for line in RUN)


@pytest.mark.medium
def test_commands_run_in_order(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, tmp_path / "out" / "model")
    for line in RUN:
        # The tiny model learned nothing: what it says is not compared, only its numbers are.
        result = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{line}: {result.output}"


def test_every_command_on_the_page_parses() -> None:
    """Options are looked up in the command line's own tables; nothing is run."""
    group = typer.main.get_command(app)
    lines = [line.strip() for line in PAGE.splitlines() if re.match(r" {4}(\S*/)?fmedge ", line)]
    lines += re.findall(r"`(fmedge \w+ [^`]*--[^`]*)`", PAGE)
    assert len(lines) >= 5
    for line in lines:
        _, name, *arguments = shlex.split(line)
        command = group.commands[name]  # type: ignore[attr-defined]
        known = {option for parameter in command.params for option in parameter.opts}
        unknown = {argument for argument in arguments if argument.startswith("--")} - known
        assert not unknown, f"{line}: {unknown}"


def test_targets_and_extras_exist() -> None:
    names = set(re.findall(r"`((?:orin|agx|thor)[\w.-]*)`", PAGE)) | set(
        re.findall(r"--target (\S*(?:orin|thor)\S*)", PAGE)
    )
    assert {name.strip("`") for name in names} <= set(DEVICES)
    for asked in re.findall(r"fmedge\[([\w,]+)\]", PAGE):
        assert set(asked.split(",")) <= set(extras())


@pytest.mark.parametrize("name", ["jetpack-6.2.Dockerfile", "jetpack-7.2.Dockerfile"])
def test_dockerfiles_install_what_there_is(name: str) -> None:
    """Their instructions are known ones, and what they copy and install from here exists. No image is built."""
    text = (ROOT / "examples" / "docker" / name).read_text("utf-8")
    code = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in code.splitlines() if line]
    assert {word for word, _ in lines} <= {"ARG", "FROM", "RUN", "COPY", "ADD", "ENV", "WORKDIR", "ENTRYPOINT"}
    assert f"examples/docker/{name}" in PAGE
    assert f"-f examples/docker/{name} " in text and "Not run on a board yet" in text
    (base,) = [rest for word, rest in lines if word == "FROM"]
    assert f"`{base}`" in PAGE

    copied = {source for word, rest in lines if word == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    # What hatchling reads to make the wheel.
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    packages = re.search(r"^packages = \[(.*)\]", project, re.MULTILINE)
    assert packages is not None
    needed = {path.strip(' "').split("/")[0] for path in packages.group(1).split(",")}
    assert copied == needed | {"pyproject.toml", "README.md", "LICENSE"}

    arguments = {rest.split("=")[0] for word, rest in lines if word == "ARG"}
    assert set(re.findall(r"\$\{(\w+)\}", code)) == arguments
    (asked,) = re.findall(r'"\.\[([\w,]+)\]"', code)
    assert set(asked.split(",")) <= set(extras())
    # JetPack 6 has Python 3.10, for which there is no ONNX Runtime, and CUDA 12.
    assert ("cpu" in asked, '"cuda-bindings<13"' in code) == ((False, True) if "6.2" in name else (True, False))


def test_commands_with_docker_parse() -> None:
    group = typer.main.get_command(app)
    found = re.findall(r"docker run .* fmedge (\w+) /bundle", PAGE)
    assert len(found) >= 3 and set(found) <= set(group.commands)  # type: ignore[attr-defined]

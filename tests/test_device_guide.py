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
    # tomllib is Python 3.11's, and this page's tests run on 3.10, too.
    section = (ROOT / "pyproject.toml").read_text("utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    for asked in re.findall(r"fmedge\[([\w,]+)\]", PAGE):
        assert set(asked.split(",")) <= set(extras)


@pytest.mark.parametrize("name", ["jetpack-6.2.Dockerfile", "jetpack-7.2.Dockerfile"])
def test_dockerfiles_install_what_there_is(name: str) -> None:
    """Their instructions are known ones, and what they install from here exists. No image is built."""
    text = (ROOT / "examples" / "docker" / name).read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    known = {"ARG", "FROM", "RUN", "COPY", "ENV", "WORKDIR", "ENTRYPOINT"}
    assert {line.split()[0] for line in lines} <= known
    assert f"examples/docker/{name}" in PAGE or name in PAGE
    assert "Not run on a board yet" in text

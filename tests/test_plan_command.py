"""`fmedge plan` says what the plan says, and whether it fits; `--memory` is what a model keeps to."""

from __future__ import annotations

import json

import pytest
import typer
from fake_session import CONTEXT, HYBRID, make_bundle
from fmedge_runtimes.manifest import write_manifest
from fmedge_runtimes.plan import plan
from typer.testing import CliRunner

from fmedge.cli import app
from fmedge.commands.byte_size import parse_bytes, show_bytes


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    bundle = make_bundle(tmp_path_factory.mktemp("plan") / "bundle", layers=HYBRID)
    write_manifest(bundle.folder, bundle.manifest)
    return bundle


def fmedge(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_the_table_has_every_part(small):
    done = fmedge(small.folder, "--slots", 3, "--context", 64, "--memory", "1GiB")
    found = plan(small, 3, 64, 1 << 30)
    lines = {line[:16].strip(): line[16:].strip() for line in done.output.splitlines()}
    assert done.exit_code == 0
    assert found.states > 0
    for name in ("weights", "cache", "states", "total"):
        assert lines[name] == show_bytes(getattr(found, name))
    assert lines["memory"] == "1.0 GiB asked for: it fits"
    assert lines["largest context"] == f"{CONTEXT} tokens, the whole of it"


def test_what_does_not_fit_exits_with_1_and_says_what_would(small):
    memory = plan(small, 3, 64).total
    done = fmedge(small.folder, "--slots", 4, "--context", 64, "--memory", memory)
    assert done.exit_code == 1
    assert "it does NOT fit" in done.output
    assert "3 with 64 tokens each" in done.output
    assert fmedge(small.folder, "--slots", 3, "--context", 64, "--memory", memory).exit_code == 0


def test_json_is_the_plan_and_the_default_is_what_is_free(small, monkeypatch):
    monkeypatch.setattr("fmedge_runtimes.memory.available_bytes", lambda: 1 << 20)
    record = json.loads(fmedge(small.folder, "--json").output)
    found = plan(small, 1, None, 1 << 20)
    assert record.pop("total") == found.total
    assert record.pop("fits") is found.fits is True
    assert record == {name: getattr(found, name) for name in record}
    assert record["memory"] == 1 << 20
    assert set(record) >= {"weights", "working", "cache", "states", "largest_context", "largest_slots"}


@pytest.mark.parametrize(
    ("text", "amount"),
    [("6GiB", 6 << 30), ("1.5g", 3 << 29), ("512 MiB", 512 << 20), ("2GB", 2 * 10**9), ("77", 77), ("5B", 5)],
)
def test_amounts(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "six", "6XB", "-1G", "0", "6iB", "1..5G"])
def test_what_is_no_amount_is_a_usage_error(text, small):
    with pytest.raises(typer.BadParameter):
        parse_bytes(text)
    assert fmedge(small.folder, f"--memory={text}").exit_code == 2

"""`fmedge bench`: what is timed is what ran, and what cannot be measured is said."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from fake_session import CONTEXT, FakeSession, make_bundle
from fmedge_runtimes import load
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.manifest import write_manifest

from fmedge.commands.measurement import Workload, measure, memory_bandwidth

DELAY = 0.01


class Slow(FakeSession):
    def run(self, feeds, results):
        time.sleep(DELAY)
        super().run(feeds, results)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    bundle = make_bundle(tmp_path / "bundle")
    write_manifest(bundle.folder, bundle.manifest)
    monkeypatch.setattr(load, "open_session", lambda *_: Slow())
    return bundle


def test_the_figures_are_those_of_the_steps(fake):
    one, three = measure(fake.folder, Workload((3, 1, 3), 10, 6, 2, None, None))
    assert (one.batch, three.batch) == (1, 3)
    for measured in (one, three):
        assert measured.token_ms_p95 >= measured.token_ms_p50 >= DELAY * 1e3
        assert 0 < measured.decode_tokens_per_second <= measured.batch / DELAY
        assert 0 < measured.prefill_tokens_per_second <= 10 / DELAY
        assert 0 <= measured.outside_graph < 1
        assert measured.device == "cpu"
        assert measured.weights_bytes == len(b"graph")
    # Prompts go through one after the other.
    assert three.first_token_ms >= 2 * DELAY * 1e3
    assert three.peak_bytes >= one.peak_bytes > 10e6


def test_what_does_not_fit_is_refused(fake):
    with pytest.raises(RequestError, match=f"do not fit into the context of .*, {CONTEXT}"):
        measure(fake.folder, Workload((1,), CONTEXT, 2, 1, None, None))


def test_memory_has_a_bandwidth():
    assert 1e8 < memory_bandwidth(1, nbytes=16 << 20, seconds=0.05) < 1e13


def bench(*arguments):
    command = [sys.executable, "-m", "fmedge", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_usage_and_missing_bundles():
    assert bench("nowhere", "--batch", "1,x").returncode == 2
    assert bench("nowhere", "--batch", "0").returncode == 2
    done = bench("nowhere")
    assert done.returncode == 1
    assert "fmedge: error: nowhere is not a folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.medium
def test_bundles_side_by_side(bundle):
    call = (bundle, bundle, "--batch", "2,1", "--prompt", 16, "--new", 8, "--repeats", 2, "--threads", 1)
    record = json.loads(bench(*call, "--json").stdout)
    assert [one["batch"] for one in record["results"]] == [1, 2, 1, 2]
    assert record["memory_bytes_per_second"] > 1e8
    for one in record["results"]:
        assert one["bundle"] == str(bundle)
        expected = one["weights_bytes"] * one["decode_tokens_per_second"] / one["batch"]
        assert one["bandwidth_share"] == pytest.approx(expected / record["memory_bytes_per_second"])
        assert one["peak_bytes"] > 20e6
    table = bench(*call)
    assert table.returncode == 0
    assert table.stdout.count(bundle.name) >= 4
    assert "GB/s" in table.stdout

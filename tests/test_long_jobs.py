"""Long jobs: nothing lost, nothing twice, whatever happens; memory that does not grow with the input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import tracemalloc

import fmedge_runtimes.load
import pytest
from fake_session import FakeSession, make_bundle
from fmedge_runtimes.errors import BackendError, FmedgeError
from fmedge_runtimes.load import load
from fmedge_runtimes.manifest import write_manifest
from fmedge_runtimes.sampling import Sampling
from typer.testing import CliRunner

from fmedge.cli import app
from fmedge.commands.job import opened

TOKENS = ["--max-new-tokens", "2", "--ignore-eos"]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A bundle with a session that plays its graph."""
    bundle = make_bundle(tmp_path / "bundle")
    write_manifest(bundle.folder, bundle.manifest)
    monkeypatch.setattr(fmedge_runtimes.load, "open_session", lambda *_: FakeSession())
    return bundle.folder


def fmedge(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def results(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def words(number):
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def test_results_are_those_of_single_calls_with_their_ids(fake, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": words(number), "id": f"n{number}"}) for number in range(40)]
    lines[7] = '{"prompt": "abc"}'
    lines[9:9] = ["", "   "]
    lines.append('{"prompt": "abc", "n": 3, "temperature": 1, "seed": 5, "id": 77}')
    source.write_text("\n".join(lines))
    done = fmedge(fake, "-i", source, "-o", output, *TOKENS)
    assert (done.exit_code, done.output) == (0, "")
    records = results(output)
    assert sorted(str(record["id"]) for record in records) == sorted(
        [*(f"n{number}" for number in range(40) if number != 7), "8", "77", "77", "77"]
    )
    with load(fake) as model:
        for record in records[::7]:
            if record["id"] != 77:
                prompt = words(str(record["id"])[1:]) if record["id"] != 8 else "abc"
                (alone,) = model.generate(prompt, Sampling(2, ignore_eos=True))
                assert record["tokens"] == list(alone.tokens)
    assert [record["index"] for record in records if record["id"] == 77] == [0, 1, 2]


def test_bad_lines_are_results_with_an_error(fake, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = {
        2: b"{",
        4: b"\xff\xfe",
        5: b'{"prompt": "a", "colour": 1}',
        6: b'{"prompt": "a", "top_p": 7, "id": "odd"}',
        7: b'{"prompt": ""}',
        8: b'{"prompt": "a", "id": [1]}',
        9: b'{"messages": [{"role": "user", "content": "a"}]}',
        10: b'{"prompt": "' + b"a" * 300 + b'", "id": "long"}',
    }
    source.write_bytes(b"\n".join(bad.get(number, b'{"prompt": "abc"}') for number in range(1, 13)))
    done = fmedge(fake, "-i", source, "-o", output, *TOKENS)
    assert done.exit_code == 1
    assert done.stderr == f'fmedge: 8 of 12 prompts failed; see "error" in {output}.\n'
    records = {record["line"]: record for record in results(output)}
    assert sorted(records) == list(range(1, 13))
    assert {number for number, record in records.items() if record["error"]} == set(bad)
    assert {records[number]["id"] for number in bad} == {2, 4, 5, 6, 7, 8, 9, "long"}
    assert "colour" in records[5]["error"]
    assert all(len(records[number]["tokens"]) == 2 for number in (1, 3, 11, 12))
    # Errors are results: a job that is continued does not repeat them, and still says that they are there.
    before = output.read_bytes()
    assert fmedge(fake, "-i", source, "-o", output, *TOKENS, "--resume").exit_code == 1
    assert output.read_bytes() == before


def test_memory_does_not_grow_with_the_input(fake, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w") as file:
        for number in range(600):
            file.write(json.dumps({"prompt": words(number)}) + " " * 50_000 + "\n")
    fmedge(fake, "abc", *TOKENS)  # imports are not what is measured
    tracemalloc.start()
    try:
        assert fmedge(fake, "-i", source, "-o", output, "--max-new-tokens", 1, "--ignore-eos").exit_code == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sorted(record["id"] for record in results(output)) == list(range(1, 601))
    assert peak < 4e6 < source.stat().st_size / 5


def test_an_output_is_not_overwritten_unasked(fake, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "abc"}\n')
    output.write_text("precious\n")
    for options, text in (([], "exists; continue it"), (["--resume"], "out.jsonl:1 is no result")):
        done = fmedge(fake, "-i", source, "-o", output, *options)
        assert isinstance(done.exception, FmedgeError)
        assert text in str(done.exception)
        assert output.read_text() == "precious\n"
    assert fmedge(fake, "-i", source, "-o", source, "--force").exit_code == 1
    assert fmedge(fake, "-i", source, "-o", output, "--force", "--resume").exit_code == 2
    assert fmedge(fake, "abc", "--resume").exit_code == 2
    assert output.read_text() == "precious\n"
    assert fmedge(fake, "-i", source, "-o", output, "--force").exit_code == 0
    assert [record["id"] for record in results(output)] == [1]


def test_whatever_was_cut_off_is_done_again_and_nothing_else(fake, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": words(n), "id": "ä" * n, "n": 1 + n % 3}) + "\n" for n in range(6)))
    call = (fake, "-i", source, "-o", output, *TOKENS, "--temperature", 1, "--seed", 1)
    assert fmedge(*call).exit_code == 0
    whole = output.read_bytes()
    expected = sorted(json.dumps([record["id"], record["index"], record["tokens"]]) for record in results(output))
    for cut in [*range(0, len(whole), 211), len(whole)]:
        output.write_bytes(whole[:cut])
        assert fmedge(*call, "--resume").exit_code == 0
        found = [json.dumps([record["id"], record["index"], record["tokens"]]) for record in results(output)]
        assert sorted(found) == expected


def test_another_input_is_noticed(fake, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "abc", "id": "a"}\n')
    fmedge(fake, "-i", source, "-o", output, *TOKENS)
    source.write_text('{"prompt": "abc", "id": "b"}\n')
    done = fmedge(fake, "-i", source, "-o", output, *TOKENS, "--resume")
    assert "in.jsonl:1 is not the line" in str(done.exception)
    source.write_text('{"prompt": "abc", "id": "a"}\n{"prompt": "abd", "id": "c"}\n')
    assert fmedge(fake, "-i", source, "-o", output, *TOKENS, "--resume").exit_code == 0
    assert [record["id"] for record in results(output)] == ["a", "c"]


def test_a_graph_that_fails_stops_the_job_which_then_goes_on(fake, tmp_path, monkeypatch):
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("".join(words(number) + "\r\n" for number in range(60)))

    class Failing(FakeSession):
        def run(self, feeds, results):
            if len(self.steps) > 40:
                raise BackendError("the device is gone.")
            super().run(feeds, results)

    monkeypatch.setattr(fmedge_runtimes.load, "open_session", lambda *_: Failing())
    done = fmedge(fake, "-i", source, "-o", output, *TOKENS, "--max-batch", 2)
    assert "the device is gone" in str(done.exception)
    some = len(results(output))
    assert 0 < some < 60
    monkeypatch.setattr(fmedge_runtimes.load, "open_session", lambda *_: FakeSession())
    assert fmedge(fake, "-i", source, "-o", output, *TOKENS, "--resume").exit_code == 0
    assert sorted(record["id"] for record in results(output)) == list(range(1, 61))


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_an_output_has_one_writer(fake, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "abc"}\n')
    for before in ("", '{"id": 1, "line": 1, "of": 1}\n'):
        output.write_text(before)
        with opened(source, output, resume=True, force=False):
            for options in ([], ["--resume"], ["--force"]):
                done = fmedge(fake, "-i", source, "-o", output, *TOKENS, *options)
                assert isinstance(done.exception, FmedgeError)
                assert "another process writes" in str(done.exception)
        assert output.read_text() == before


def test_a_job_that_never_begins_leaves_nothing(fake, tmp_path, monkeypatch):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "abc"}\n')

    def broken(*_):
        raise BackendError("the device is gone.")

    monkeypatch.setattr(fmedge_runtimes.load, "open_session", broken)
    assert "the device is gone" in str(fmedge(fake, "-i", source, "-o", output, *TOKENS).exception)
    assert not output.exists()
    output.write_text("precious\n")
    fmedge(fake, "-i", source, "-o", output, *TOKENS, "--force")
    assert output.read_text() == "precious\n"


@pytest.mark.medium
@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_a_second_process_is_refused_and_the_first_goes_on(bundle, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Once {n}"}) + "\n" for n in range(1500)))
    call = [str(part) for part in (sys.executable, "-m", "fmedge", "generate", bundle, "-i", source, "-o", output)]
    with subprocess.Popen([*call, *TOKENS], stderr=subprocess.PIPE) as first:
        while first.poll() is None and not (output.exists() and output.stat().st_size):
            time.sleep(0.01)
        # Held still, so that it cannot end before the second one looks.
        first.send_signal(signal.SIGSTOP)
        try:
            second = subprocess.run([*call, *TOKENS, "--resume"], capture_output=True, text=True, check=False)
        finally:
            first.send_signal(signal.SIGCONT)
        assert first.wait(120) == 0
    assert second.returncode == 1
    assert second.stderr.startswith(f"fmedge: error: another process writes {output}; wait")
    assert sorted(record["id"] for record in results(output)) == list(range(1, 1501))


@pytest.mark.medium
def test_killed_and_resumed(bundle, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Once {n}", "id": f"id-{n}"}) + "\n" for n in range(2000)))
    call = [sys.executable, "-m", "fmedge", "generate", bundle, "-i", source, "-o", output, *TOKENS, "--resume"]
    lengths = [0]
    for _ in range(3):
        with subprocess.Popen(list(map(str, call)), stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if output.exists() and output.stat().st_size > lengths[-1] + 20_000:
                    break
                time.sleep(0.01)
            assert process.poll() is None, process.stderr.read()
            process.send_signal(signal.SIGKILL)
        lengths.append(output.stat().st_size)
    assert 0 < output.read_bytes().count(b"\n") < 2000
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(record["id"] for record in results(output)) == sorted(f"id-{n}" for n in range(2000))

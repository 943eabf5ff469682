"""The command line: formats in and out, exit codes, one-line errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jsonschema
import pytest
from fmedge_runtimes.bundle import open_bundle
from fmedge_runtimes.manifest import MatrixFacts

from fmedge import cli
from fmedge.commands.inspect import show


class Called(NamedTuple):
    """What a command left."""

    returncode: object
    stdout: str
    stderr: str


def fmedge(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fmedge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=stdin)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """`fmedge` in this process, which has imported what a process of its own would have to."""

    def call(*arguments: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["fmedge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Called(ended.value.code, *capfd.readouterr())

    return call


def test_one_prompt_prints_its_text(bundle: Path) -> None:
    done = fmedge("generate", bundle, "The list", "--max-new-tokens", 8)
    record = json.loads(fmedge("generate", bundle, "The list", "--max-new-tokens", 8, "--json").stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == record["text"] + "\n"
    assert len(record["tokens"]) == 8
    assert record["finish_reason"] == "length"


def test_prompts_from_stdin_files_and_arguments(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "The list"}\n\n{"prompt": [5, 6, 7], "max_new_tokens": 3}\n'
        '{"messages": [{"role": "user", "content": "Hi"}], "stop": ["zzz"]}\n'
    )
    done = fmedge("generate", bundle, "A tuple", "-i", tmp_path / "prompts.jsonl", "-o", tmp_path / "out.jsonl",
                  "--max-new-tokens", 5)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    records = sorted(
        map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()), key=lambda r: r["prompt_index"]
    )
    assert [len(record["tokens"]) for record in records] == [5, 5, 3, 5]
    piped = fmedge("generate", bundle, "-i", "-", "-o", "-", "--max-new-tokens", 5, stdin="The list\nA tuple\n")
    by_index = {item["prompt_index"]: item["tokens"] for item in map(json.loads, piped.stdout.splitlines())}
    assert by_index == {0: records[1]["tokens"], 1: records[0]["tokens"]}


def test_a_prompt_that_cannot_be_served_fails_alone(bundle: Path) -> None:
    done = fmedge("generate", bundle, "The list", "word " * 500, "--json", "--max-new-tokens", 4)
    assert done.returncode == 1
    assert "prompt 1: the prompt has" in done.stderr
    records = {item["prompt_index"]: item for item in map(json.loads, done.stdout.splitlines())}
    assert len(records[0]["tokens"]) == 4
    assert (records[1]["finish_reason"], records[1]["tokens"]) == ("error", [])
    assert records[1]["error"] in done.stderr


def test_seeds_reproduce_and_completions_differ(bundle: Path) -> None:
    call = ["generate", bundle, "Once", "--temperature", 1, "--seed", 3, "--n", 3, "--json", "--max-new-tokens", 12]
    first, second = ([json.loads(line)["tokens"] for line in fmedge(*call).stdout.splitlines()] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert len({tuple(tokens) for tokens in first}) == 3


def test_chat(bundle: Path) -> None:
    done = fmedge("generate", bundle, "--chat", "--system", "Be brief.", "Hi", "--max-new-tokens", 4, "--json")
    assert json.loads(done.stdout)["stats"]["prompt_tokens"] > 10
    assert fmedge("generate", bundle, "Hi", "--system", "Be brief.").returncode == 2


PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.medium
def test_constraints_from_files_arguments_and_lines(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    (tmp_path / "g.lark").write_text('start: "x" DIGIT+\nDIGIT: /[0-9]/')
    (tmp_path / "prompts.jsonl").write_text(
        f'{{"prompt": "a", "json_schema": {json.dumps(PERSON)}}}\n'
        '{"prompt": "b", "regex": "[0-9]{4}"}\n{"prompt": "c"}\n{"prompt": "d", "regex": "(a"}\n'
    )
    tight = ["--temperature", 1, "--seed", 1, "--max-new-tokens", 200]
    for schema in (tmp_path / "person.json", json.dumps(PERSON)):
        done = fmedge("generate", bundle, "A person:", "--json-schema", schema, *tight)
        assert (done.returncode, done.stderr) == (0, "")
        jsonschema.validate(json.loads(done.stdout), PERSON)
    done = fmedge("generate", bundle, "A", "--grammar", tmp_path / "g.lark", "--max-new-tokens", 5)
    assert re.fullmatch("x[0-9]*\n", done.stdout)
    assert "cut off after 5 tokens (length), so the text may be incomplete (grammar)" in done.stderr
    done = fmedge("generate", bundle, "-i", tmp_path / "prompts.jsonl", "--json", *tight)
    assert done.returncode == 1
    records = {item["prompt_index"]: item for item in map(json.loads, done.stdout.splitlines())}
    jsonschema.validate(json.loads(records[0]["text"]), PERSON)
    assert re.fullmatch("[0-9]{4}", records[1]["text"])
    (free,) = fmedge("generate", bundle, "c", "--json", *tight).stdout.splitlines()
    assert records[2]["tokens"] == json.loads(free)["tokens"]
    assert "unclosed group" in records[3]["error"]


@pytest.mark.medium
def test_tokens_and_logprobs(bundle: Path) -> None:
    call = ["generate", bundle, "The list", "--json", "--max-new-tokens", 4, "--ignore-eos"]
    plain = json.loads(fmedge(*call).stdout)
    assert plain["logprobs"] is None
    first, second, third, _ = plain["tokens"]
    changed = json.loads(
        fmedge(
            *call, "--logprobs", 2, "--ban", first, "--force-token", 7, "--force-token", 8, "--logit-bias", "9=1000"
        ).stdout
    )
    assert changed["tokens"] == [7, 8, 9, 9]
    assert [len(one["top"]) for one in changed["logprobs"]] == [2] * 4
    assert changed["logprobs"][0]["top"][0][0] == first
    assert changed["cumulative_logprob"] == pytest.approx(sum(one["logprob"] for one in changed["logprobs"]))
    stopped = json.loads(fmedge(*call, "--stop-token", second, "--stop-token", third).stdout)
    assert stopped["tokens"] == plain["tokens"][: 1 if first in (second, third) else 2]
    assert stopped["finish_reason"] == "stop"


@pytest.mark.medium
def test_the_best_of_several(bundle: Path) -> None:
    call = ["generate", bundle, "Once", "--temperature", 1, "--seed", 3, "--json", "--max-new-tokens", 12]
    (best,) = fmedge(*call, "--best-of", 4, "--typical-p", 0.9).stdout.splitlines()
    everyone = [
        json.loads(line) for line in fmedge(*call, "--n", 4, "--logprobs", 0, "--typical-p", 0.9).stdout.splitlines()
    ]
    scores = {tuple(one["tokens"]): one["cumulative_logprob"] / len(one["tokens"]) for one in everyone}
    assert tuple(json.loads(best)["tokens"]) == max(scores, key=scores.get)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "nowhere", "Hi"], "nowhere is not a folder"),
        (["generate", "BUNDLE"], "there is no prompt"),
        (["generate", "BUNDLE", "-i", "missing.txt"], "cannot read missing.txt"),
        (["generate", "BUNDLE", "Hi", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "BUNDLE", "Hi", "--min-new-tokens", "300"], "above max_new_tokens"),
        (["generate", "BUNDLE", "Hi", "--json-object", "--regex", "a"], "json and regex"),
        (["generate", "BUNDLE", "Hi", "--json-schema", "missing.json"], "cannot read missing.json"),
        (["generate", "BUNDLE", "Hi", "--json-schema", "{"], "JSON Schema"),
        (["generate", "BUNDLE", "Hi", "--logit-bias", "x=1"], "logit_bias"),
        (["generate", "BUNDLE", "Hi", "--device", "tpu"], "there is no device tpu"),
        (["generate", "BUNDLE", "Hi", "-o", "nowhere/out.jsonl"], "cannot write nowhere/out.jsonl"),
        (["inspect", "."], "is not a bundle"),
        (["verify", "."], "is not a bundle"),
        (["export", "nowhere", "out", "--target", "tpu"], "there is no target tpu"),
        (["export", "nowhere", "out", "--block-size", "33"], "--block-size is 33"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(
    arguments: list[str], words: str, bundle: Path, called: Callable[..., Called]
) -> None:
    done = called(*(str(bundle) if item == "BUNDLE" else item for item in arguments))
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("fmedge: error: ")
    assert done.stdout == ""


def test_usage_errors_exit_with_2_and_debug_shows_the_traceback(bundle: Path, called: Callable[..., Called]) -> None:
    assert called("generate").returncode == 2
    assert called("export", "a", "b", "--verify", "sometimes").returncode == 2
    assert fmedge("nonsense").returncode == 2
    assert called("generate", bundle, "Hi", "--logprobs", 2).returncode == 2
    assert called("generate", bundle, "Hi", "--logit-bias", "5").returncode == 2
    done = fmedge("--debug", "inspect", "nowhere")
    assert "Traceback" in done.stderr
    assert done.returncode == 1


def test_malformed_json_lines_name_file_and_line(bundle: Path, tmp_path: Path, called: Callable[..., Called]) -> None:
    path = tmp_path / "prompts.jsonl"
    for line, words in (
        ("{", "is not JSON"),
        ("5", "must be an object"),
        ("{}", 'needs either "prompt" or "messages"'),
        ('{"prompt": 5}', "must be a text or a list"),
        ('{"prompt": "x", "temprature": 1}', "unknown key 'temprature'"),
        ('{"prompt": "x", "top_p": 7}', "top_p is 7"),
        ('{"prompt": "x", "min_new_tokens": 500}', "above max_new_tokens"),
        ('{"prompt": "x", "json": true, "stop": ["a"]}', "json and stop"),
    ):
        path.write_text('{"prompt": "fine"}\n' + line + "\n")
        done = called("generate", bundle, "-i", path)
        assert done.returncode == 1
        assert f"{path}:2" in done.stderr
        assert words in done.stderr


def test_inspect_and_verify(bundle: Path) -> None:
    text = fmedge("inspect", bundle).stdout
    for words in ("llama, 2 layers", "target", "evidence (graph)", "evidence (full)", "passed", "torch 2.13"):
        assert words in text
    assert json.loads(fmedge("inspect", bundle, "--json").stdout)["format"] == 1
    done = fmedge("verify", bundle)
    assert "every checksum is right" in done.stdout
    assert "64 golden tokens reproduced on cpu" in done.stdout
    assert json.loads(fmedge("verify", bundle, "--json").stdout)["golden_tokens"] == 64


def test_inspect_groups_matrices_and_warns_of_a_source_that_is_worse_than_guessing(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_bundle(bundle, checksums=False)
    manifest = opened.manifest
    (full,) = (item for item in manifest.evidence if item.name == "full")
    worse = full.model_copy(update={"figures": {**full.figures, "source_perplexity": manifest.text.vocabulary + 1.0}})
    better = full.model_copy(update={"figures": {**full.figures, "source_perplexity": manifest.text.vocabulary - 1.0}})
    names = [*(f"layers.{layer}.up.weight" for layer in (10, 0, 2, 1)), "layers.4.q.weight+layers.4.k.weight", "head"]
    matrices = {name: MatrixFacts(bits=4, block_size=32, symmetric=True) for name in names}
    for evidence, warns in ((worse, True), (better, False)):
        update = {"evidence": (evidence,), "matrices": matrices}
        show(replace(opened, manifest=manifest.model_copy(update=update)), as_json=False)
        shown = capsys.readouterr().out
        assert "4 bits, blocks of 32: layers.0-2,10.up, layers.4.q+layers.4.k, head\n" in shown
        assert ("predicts the text worse than guessing" in shown) == warns


def test_an_adapter_that_is_not_there_is_one_line(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    done = fmedge("export", llama, tmp_path / "bundle", "--adapter", tmp_path / "lora", "--allow-pickle")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "no adapter_config.json" in done.stderr

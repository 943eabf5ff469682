"""Decoders of transformers, written for TensorRT: python tests/tensorrt_architectures.py --records FILE --page

Each model type that docs/architectures.md calls exact gets its tiny random model. Its graph in fp16, in ONNX Runtime
and a ragged batch, must choose PyTorch's tokens but for near ties (where it does not, one in fp32 is asked), the rules
of `fmedge check` must pass, and TensorRT-RTX must parse it and build an engine with both profiles, without a GPU.

Options: model types and shapes (all unless given), --target, --jobs N, --seconds N for each, --records FILE (one JSON
line for each type is appended, with what failed), --page (write docs/tensorrt-architectures.md from the records, the
latest of each type).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from architectures import NEAR_TIE, SECONDS, Outcome, brief, differing, documented, run_all

PAGE = Path(__file__).parent.parent / "docs" / "tensorrt-architectures.md"
LENGTHS = (1, 40, 7)
STEPS = (16, 8, 12)
CONTEXT = 100
SHAPES = (
    "llama:hidden_size=560,num_attention_heads=7,head_dim=80,num_key_value_heads=1,vocab_size=151",
    "qwen2:hidden_size=448,num_attention_heads=7,num_key_value_heads=1,vocab_size=32003",
    "qwen3:head_dim=128,num_attention_heads=14,num_key_value_heads=2,vocab_size=151",
    "llama:head_dim=96,vocab_size=32003",
    "llama:head_dim=112,vocab_size=151",
    "gemma3_text:head_dim=256,vocab_size=32003",
    "phi:hidden_size=320,num_key_value_heads=4,vocab_size=151",
)
"""Heads, groups and vocabularies of models in use that no tiny model has: type:key=number,key=number."""


@dataclass
class Record:
    """What happened to one model type, for a target."""

    model_type: str
    target: str
    stage: str = "export"
    """The last one that was begun."""
    wrong: dict[str, int] = field(default_factory=dict)
    """Tokens by type of the graph that PyTorch would not have chosen."""
    tokens: int = 0
    """That were compared."""
    rules: list[str] = field(default_factory=list)
    """What the rules found, notes left out."""
    problems: list[str] = field(default_factory=list)
    """What TensorRT-RTX refused, or why the export stopped."""
    seconds: float = 0.0

    @property
    def outcome(self) -> Outcome:
        """As a row of the page."""
        kind, detail = "refused", "; ".join(self.problems)[:300]
        if self.stage == "tokens" or self.wrong.get("float32"):
            kind, detail = "mismatch", f"{self.wrong} of {self.tokens} tokens differ from PyTorch's; {detail}"
        elif self.rules:
            kind, detail = "rules find something", f"{self.rules[0][:200]}; TensorRT-RTX: {detail or 'builds it'}"
        elif self.stage in ("rules", "parse", "build"):
            kind = f"{self.stage} fails"
        elif self.stage == "done":
            wrong = self.wrong["float16"]
            kind, detail = "built", f"{wrong} of {self.tokens} in fp16" if wrong else ""
        return Outcome(self.model_type, kind, detail)


def evaluate(target_name: str, records: Path | None, model_type: str, folder: Path) -> Outcome:
    """Export, compare, check, parse and build a tiny model of a type; a process that dies leaves its stage behind."""
    record = Record(model_type, target_name)
    started = time.perf_counter()
    try:
        _try(record, folder)
    except Exception as error:
        record.problems.append(brief(f"{type(error).__name__}: {error}", folder))
        if os.environ.get("TRACEBACK"):
            record.problems.append(traceback.format_exc())
    record.seconds = round(time.perf_counter() - started, 1)
    if records is not None:
        with records.open("a") as file:
            file.write(json.dumps(asdict(record) | {"kind": record.outcome.kind}) + "\n")
    return record.outcome


def _try(record: Record, folder: Path) -> None:
    import numpy as np
    import torch
    from fmedge_converters import rtx
    from fmedge_converters.build import BuildOptions, build_decoder
    from fmedge_converters.checkpoint import Files
    from fmedge_converters.evidence import text_facts
    from fmedge_converters.preflight.graph import read_graph
    from fmedge_converters.preflight.rtx_child import ask_rtx
    from fmedge_converters.preflight.rules import apply_rules
    from fmedge_converters.preflight.versions import find_version
    from fmedge_converters.profiles import decoder_profiles
    from fmedge_converters.reduced import write_random_model
    from fmedge_converters.targets import TARGETS
    from fmedge_runtimes.decoder import Decoder
    from fmedge_runtimes.golden import continue_greedily
    from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
    from tiny import tiny_config

    model_type, changes = changes_of(record.model_type)
    config = tiny_config(model_type, **changes)
    reference = write_random_model(config, folder / "model", seed=0)
    random = np.random.default_rng(0)
    for dtype, near_tie in ((torch.float16, 5e-2), (torch.float32, NEAR_TIE)):
        record.stage = "export"
        output = folder / str(dtype)
        output.mkdir()
        row = replace(TARGETS[record.target], dtype=dtype)
        options = BuildOptions(row, row.schemes["none"], None, CONTEXT)
        built = build_decoder(config, Files(folder / "model"), output, options, lambda *_: None)
        record.stage = "tokens"
        prompts = [random.integers(3, built.vocabulary, length).tolist() for length in LENGTHS]
        session = OnnxRuntimeSession(built.written.graph, "cpu", 1)
        rows = continue_greedily(Decoder(session, text_facts(built, CONTEXT)), prompts, STEPS)
        session.close()
        found = [[step.token for step in row] for row in rows]
        record.tokens = sum(map(len, found))
        wrong = differing(reference, prompts, found, near_tie)
        record.wrong[str(dtype).removeprefix("torch.")] = wrong
        if not wrong:
            break
    graph = folder / str(torch.float16) / built.written.graph.name
    record.stage = "rules"
    findings = apply_rules(read_graph(graph), find_version(record.target))
    record.rules = [str(item) for item in findings if item.effect != "note"]
    record.stage = "parse"
    verdict = ask_rtx(graph, decoder_profiles(4, CONTEXT), rtx.CAPABILITY)
    record.problems = [str(problem) for problem in verdict.problems]
    if verdict.parsed:
        record.stage = "done" if verdict.built else "build"


def page(records: Path) -> str:
    """docs/tensorrt-architectures.md."""
    latest: dict[tuple[str, str], Record] = {}
    for line in records.read_text("utf-8").splitlines():
        fields = json.loads(line)
        del fields["kind"]
        latest[fields["target"], fields["model_type"]] = Record(**fields)
    lines = [
        "# Architectures for TensorRT",
        "",
        "Written by `python tests/tensorrt_architectures.py` from what ran; do not edit. Each model type got a tiny",
        "random model, exported in fp16. *Built*: in ONNX Runtime on the CPU, in a ragged batch, every greedy token is",
        "PyTorch's or a near tie; the rules of `fmedge check` find nothing; and TensorRT-RTX 1.7.1 parses the graph",
        "and builds an engine with both profiles, without a GPU. No engine ran. Types of",
        "[architectures.md](architectures.md) that are not here were not tried.",
    ]
    for target in dict.fromkeys(target for target, _ in latest):
        outcomes = [record.outcome for (other, _), record in sorted(latest.items()) if other == target]
        lines += ["", f"## {target}"]
        for wanted, kind in ((False, "model types"), (True, "shapes")):
            tried = [outcome for outcome in outcomes if (":" in outcome.model_type) == wanted]
            built = [outcome.model_type for outcome in tried if outcome.kind == "built"]
            if tried:
                lines += ["", f"{len(built)} of {len(tried)} {kind} built: {', '.join(built)}."]
        if others := [outcome for outcome in outcomes if outcome.kind != "built"]:
            lines += ["", "| model type | what happened | why |", "|---|---|---|"]
            lines += [f"| {outcome.model_type} | {outcome.kind} | {outcome.detail} |" for outcome in others]
    return "\n".join(lines) + "\n"


def changes_of(name: str) -> tuple[str, dict[str, int]]:
    """A model type, and what its tiny configuration gets in place of its own sizes: type:key=number,key=number."""
    model_type, _, changes = name.partition(":")
    pairs = (item.split("=") for item in changes.split(",") if item)
    return model_type, {key: int(number) for key, number in pairs}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--target", default="rtx")
    parser.add_argument("--records", type=Path)
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    exact = [model_type for model_type, kind in documented().items() if kind == "exact"]
    run = functools.partial(evaluate, options.target, options.records)
    outcomes = run_all(options.model_types or [*exact, *SHAPES], options.jobs, run, options.seconds)
    if options.page and options.records:
        PAGE.write_text(page(options.records), "utf-8")
    failed = [outcome.model_type for outcome in outcomes if outcome.kind != "built"]
    sys.exit(f"not built: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()

"""What rounding costs: perplexity and KL divergence of fmedge's schemes and its peers' at their sizes, on one text.

    python benchmarks/quality.py MODEL --text held-out.txt
    python benchmarks/quality.py MODEL --only fmedge --export "--quantize int4 --block-size 16"
    python benchmarks/quality.py --install-peers          # once; llama.cpp is compiled, which takes long

MODEL is a folder of `fmedge train text`, or of another Llama with one safetensors file. Every form is made from it, and
gets the same windows of token ids; the figures do not depend on the machine's load. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import fmedge_runtimes
import numpy as np
from comma_list import integers, words
from fmedge_converters.targets import TARGETS
from fmedge_runtimes.likelihood import Sums
from matrices import gguf_matrix_bytes, onnx_matrix_bytes, parameters_of_matrices
from peers import FMEDGE, HERE, Form, build_genai, export_fmedge, install, write_gguf
from report import rounded
from tokenizers import Tokenizer

LIMIT_S = 1800
GENAI = {
    "int4": (),
    "int4-128": ("block_size=128",),
    "int4-k_quant": ("algo_config=k_quant",),
    "int4-k_quant_mixed": ("algo_config=k_quant_mixed",),
}
"""Extra options of onnxruntime-genai's model builder; the first are its defaults."""
GGUF = ("Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q8_0")


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure and where."""

    model: Path | None
    text: Path | None
    tokens: int
    window: int
    block_sizes: tuple[int, ...]
    export: tuple[str, ...]
    only: tuple[str, ...]
    peers: Path
    work: Path
    install_peers: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One form of the model."""

    form: str
    matrix_bytes: int
    bits_per_weight: float
    perplexity: float
    mean_kl: float
    top1_agreement: float


def options_from_arguments() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, nargs="?", help="folder of the model in transformers' form")
    parser.add_argument("--text", type=Path, help="held-out text; that of the built-in text of `fmedge train text`")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=256, help="tokens of a window; windows share nothing")
    parser.add_argument("--block-sizes", type=integers, default=(32, 64, 128), help="of fmedge's schemes with blocks")
    parser.add_argument("--export", action="append", default=[], help="options of one more export, repeatable")
    parser.add_argument("--only", type=words, default=("",), help="forms whose name begins so, as in fmedge/int4")
    parser.add_argument("--peers", type=Path, default=Path("out/peers"), help="environments of the peers")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="the model in all its forms")
    parser.add_argument("--install-peers", action="store_true", help="install the peers and stop")
    given = vars(parser.parse_args())
    if given["model"] is None and not given["install_peers"]:
        parser.error("MODEL is missing")
    return Options(**{**given, "export": tuple(given["export"])})


def forms(options: Options) -> Iterator[Form]:
    """Those of fmedge with each scheme of the CPU that decoders have, then the peers."""
    for scheme in TARGETS["cpu"].schemes.values():
        for size in options.block_sizes if scheme.block_size else (None,):
            block = [] if size is None else ["--block-size", str(size)]
            name = scheme.name if size is None else f"{scheme.name}-{size}"
            build = export_fmedge(["--quantize", scheme.name, *block])
            yield Form("fmedge", name, "score_fmedge.py", build, FMEDGE)
    for text in options.export:
        yield Form(
            "fmedge",
            text.strip().replace("--", "").replace(" ", "-"),
            "score_fmedge.py",
            export_fmedge(text.split()),
            FMEDGE,
        )
    for name, extra in GENAI.items():
        yield Form("genai", name, "score_genai.py", build_genai(extra), "genai")
    for name in GGUF:
        yield Form("llamacpp", name, "score_llamacpp.py", write_gguf(name), "llamacpp")


def main(options: Options) -> None:
    """Make what is missing, score, print."""
    if options.install_peers or options.model is None:
        install(options.peers, ["genai", "llamacpp"])
        return
    options.work.mkdir(parents=True, exist_ok=True)
    windows, logits = options.work / "windows.npy", options.work / "logits.npy"
    write_windows(options, options.model, windows)
    run([sys.executable, str(HERE / "score_torch.py"), str(options.model), str(windows), str(logits)])
    parameters = parameters_of_matrices(options.model)
    rows: list[Row] = []
    left_out: list[str] = []
    for form in forms(options):
        if not form.name.startswith(options.only):
            continue
        python = form.python(options.peers)
        if python is None:
            left_out.append(f"{form.name}: {form.environment} is not installed (--install-peers)")
            continue
        path = form.path(options.work)
        try:
            form.make(python, options.model, path, fresh=form.environment == FMEDGE)
            sums = Sums(**json.loads(run([str(python), str(HERE / form.runner), str(path), str(windows), str(logits)])))
            nbytes = gguf_matrix_bytes(path) if path.is_file() else onnx_matrix_bytes(path)
        except (subprocess.SubprocessError, ValueError, TypeError) as error:
            lines = (getattr(error, "stderr", None) or "").strip().splitlines()
            left_out.append(f"{form.name}: {(lines[-1] if lines else str(error))[:300]}")
            continue
        rows.append(Row(form.name, nbytes, nbytes * 8 / parameters, sums.perplexity, sums.mean_kl, sums.top1_agreement))
        source = sums.other_perplexity
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    logits.unlink()
    if rows:
        show(rows, source)
    for reason in left_out:
        print(f"left out: {reason}")
    facts = {"model": options.model.name, "tokens": options.tokens, "window": options.window, "parameters": parameters}
    found = {"source_perplexity": source if rows else math.nan, "rows": [asdict(row) for row in rows]}
    print(json.dumps(rounded({**facts, **found, "left_out": left_out}), separators=(",", ":")))


def write_windows(options: Options, model: Path, output: Path) -> None:
    """The token ids [W, S] of the text, without special tokens."""
    if options.text is None:
        from fmedge.training.corpus import split_documents
        from fmedge.training.python_text import python_documents

        text = "\n\n".join(split_documents(python_documents()).validation)
    else:
        text = options.text.read_text("utf-8")
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    count = min(options.tokens, len(ids)) // options.window
    if not count:
        raise SystemExit(f"the text has {len(ids)} tokens; a window is {options.window}")
    np.save(output, np.array(ids[: count * options.window], np.int64).reshape(count, options.window))


def run(command: Sequence[str]) -> str:
    """The last line that a process prints. Raises subprocess.SubprocessError."""
    # Peers' environments have numpy, and fmedge's sums need nothing else.
    runtimes = str(Path(fmedge_runtimes.__file__).parent.parent)
    paths = [runtimes, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    return (done.stdout.strip().splitlines() or [""])[-1]


def show(rows: Sequence[Row], source: float) -> None:
    """The table, the largest form first; `over source` is the perplexity's distance from PyTorch's."""
    print(f"PyTorch in fp32: perplexity {source:.4f}\n")
    print("| form | matrices kB | bits/weight | perplexity | over source | KL, nats | same best token |")
    print("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: -row.bits_per_weight):
        print(
            f"| {row.form} | {row.matrix_bytes / 1e3:.0f} | {row.bits_per_weight:.3f} | {row.perplexity:.3f} "
            f"| {row.perplexity / source - 1:+.3%} | {row.mean_kl:.3g} | {row.top1_agreement:.2%} |"
        )


if __name__ == "__main__":
    main(options_from_arguments())

"""What rounding costs: perplexity and KL divergence of fmedge's schemes and its peers' at equal sizes.

    python benchmarks/quality.py MODEL --text held-out.txt
    python benchmarks/quality.py MODEL --text manual.txt --text prose.txt --resume
    python benchmarks/quality.py MODEL --only fmedge/int4 --export "--quantize int4 --block-size 16"
    python benchmarks/quality.py --install-peers          # once; llama.cpp is compiled, which takes long

MODEL is a folder of a decoder in transformers' form, as `fmedge train text` writes it. Every form is made from it, and
gets the same windows of token ids; the figures do not depend on the machine's load. A form that cannot be made is left
out with its reason; --resume keeps the rows that an interrupted run had finished. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import fmedge_runtimes
import numpy as np
from comma_list import integers, numbers, words
from fmedge_converters.targets import TARGETS
from fmedge_runtimes.likelihood import Sums
from matrices import gguf_matrix_bytes, onnx_matrix_bytes, parameters_of_matrices, weight_files
from peers import FMEDGE, HERE, Build, Form, build_genai, export_fmedge, install, write_gguf
from quality_report import Row, print_report
from report import rounded
from tokenizers import Tokenizer

LIMIT_S = 7200
GENAI = {
    "int4": (),
    "int4-128": ("block_size=128",),
    "int4-k_quant": ("algo_config=k_quant",),
    "int4-k_quant_mixed": ("algo_config=k_quant_mixed",),
}
"""Extra options of onnxruntime-genai's model builder; the first are its defaults."""
GGUF = ("Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q8_0")
IMPORTANCE = ("Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M")
"""Those that are made with an importance matrix, too."""
MATCHED = ("genai/int4", "llamacpp/Q4_0", "llamacpp/Q4_K_M")
SMALLEST_MATCH = 4.0
"""Bits per weight below which fmedge has no forms."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure and where."""

    model: Path | None
    text: tuple[Path, ...]
    tokens: int
    window: int
    block_sizes: tuple[int, ...]
    bits: tuple[float, ...]
    match: tuple[str, ...]
    export: tuple[str, ...]
    only: tuple[str, ...]
    peers: Path
    work: Path
    resume: bool
    install_peers: bool


@dataclass(frozen=True, slots=True)
class Windows:
    """Pieces of one text, and what PyTorch makes of them."""

    text: str
    ids: Path  # [W, S]
    logits: Path  # [W, S, V]


def options_from_arguments() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, nargs="?", help="folder of the model in transformers' form")
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        help="held-out text, repeatable: a table each; that of the built-in text of `fmedge train text`",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="of each text")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window; windows share nothing")
    parser.add_argument("--block-sizes", type=integers, default=(32, 64, 128), help="of fmedge's schemes with blocks")
    parser.add_argument("--bits", type=numbers, default=(4.5, 5.0, 5.5), help="bits per weight of fmedge's --bits")
    parser.add_argument(
        "--match", type=words, default=MATCHED, help="peers at whose bits per weight fmedge's --bits is measured, too"
    )
    parser.add_argument("--export", action="append", default=[], help="options of one more export, repeatable")
    parser.add_argument("--only", type=words, default=("",), help="forms whose name begins so, as in fmedge/int4")
    parser.add_argument("--peers", type=Path, default=Path("out/peers"), help="environments of the peers")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="the models in all their forms")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an interrupted run of the same model")
    parser.add_argument("--install-peers", action="store_true", help="install the peers and stop")
    given = vars(parser.parse_args())
    if given["model"] is None and not given["install_peers"]:
        parser.error("MODEL is missing")
    return Options(**{**given, "text": tuple(given["text"]), "export": tuple(given["export"])})


def peer_forms(statistics: Path) -> Iterator[Form]:
    """Those of the other programs."""
    for name, extra in GENAI.items():
        yield Form("genai", name, "score_genai.py", build_genai(extra), "genai")
    for name in GGUF:
        yield Form("llamacpp", name, "score_llamacpp.py", write_gguf(name), "llamacpp")
    for name in IMPORTANCE:
        build = write_gguf(name, statistics)
        yield Form("llamacpp", f"{name}-imatrix", "score_llamacpp.py", build, "llamacpp")


def own_forms(options: Options) -> Iterator[Form]:
    """Those of fmedge with each scheme of the CPU that decoders have, and with --bits."""
    for scheme in TARGETS["cpu"].schemes.values():
        for size in options.block_sizes if scheme.block_size else (None,):
            block = [] if size is None else ["--block-size", str(size)]
            name = scheme.name if size is None else f"{scheme.name}-{size}"
            yield _own(name, export_fmedge(["--quantize", scheme.name, *block]))
    for bits in options.bits:
        yield _with_bits(f"{bits:g}")
    for text in options.export:
        yield _own(text.strip().replace("--", "").replace(" ", "-").replace("/", "-"), export_fmedge(text.split()))


def matched_forms(options: Options, rows: Sequence[Row]) -> Iterator[Form]:
    """Forms of fmedge with as many bits per weight as those peers that --match names."""
    sizes = {row.form: row.bits_per_weight for row in rows if row.form in options.match}
    # A budget is a bound, and what is printed is rounded down.
    wanted = {f"{math.floor(bits * 100) / 100:g}" for bits in sizes.values() if bits >= SMALLEST_MATCH}
    return map(_with_bits, sorted(wanted - {f"{bits:g}" for bits in options.bits}))


def _with_bits(bits: str) -> Form:
    return _own(f"int4-gptq-bits-{bits}", export_fmedge(["--quantize", "int4-gptq", "--bits", bits]))


def _own(name: str, build: Build) -> Form:
    return Form("fmedge", name, "score_fmedge.py", build, FMEDGE)


def main(options: Options) -> None:
    """Make what is missing, score, print."""
    if options.install_peers or options.model is None:
        install(options.peers, ["genai", "llamacpp"])
        return
    parameters = parameters_of_matrices(options.model)
    folder = work_folder(options.work, options.model)
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(windows_of_texts(options, options.model, folder))
    bench = Bench(options, options.model, folder, texts, parameters)
    bench.measure(peer_forms(bench.statistics))
    bench.measure(own_forms(options))
    bench.measure(matched_forms(options, bench.rows))
    print(file=sys.stderr)
    for text in texts:
        text.logits.unlink(missing_ok=True)
    print_report(bench.rows, bench.left_out)
    facts = {"model": options.model.name, "tokens": options.tokens, "window": options.window, "parameters": parameters}
    found = {"rows": [asdict(row) for row in bench.rows], "left_out": bench.left_out}
    print(json.dumps(rounded({**facts, **found}), separators=(",", ":")))


class Bench:
    """The rows so far, each in a file as soon as it is known."""

    def __init__(self, options: Options, model: Path, folder: Path, texts: Sequence[Windows], parameters: int) -> None:
        self._options, self._model, self._folder, self._texts = options, model, folder, texts
        self._parameters = parameters
        self._file = folder / "rows.jsonl"
        self.statistics = folder / "statistics.safetensors"
        key = json.dumps({"window": options.window, "texts": {text.text: _digest(text.ids) for text in texts}})
        self.rows = read_rows(self._file, key) if options.resume else []
        if not self.rows:
            self._file.write_text(key + "\n", "utf-8")
        self.left_out: list[str] = []

    def measure(self, forms: Iterable[Form]) -> None:
        """Make and score each form on each text, as far as there is no row of it."""
        for form in forms:
            known = {row.text for row in self.rows if row.form == form.name}
            texts = [text for text in self._texts if text.text not in known]
            if not form.name.startswith(self._options.only) or not texts:
                continue
            try:
                found = self._rows(form, texts)
            except (subprocess.SubprocessError, OSError, ValueError, TypeError, LookupError) as error:
                reason = f"{form.name}: {_reason(error)}"
                print(f"left out: {reason}", file=sys.stderr, flush=True)
                self.left_out.append(reason)
                continue
            self.rows += found
            with self._file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(row)) + "\n" for row in found)
            shown = ", ".join(f"KL {row.mean_kl:.3g}" for row in found)
            print(f"{form.name}: {found[0].bits_per_weight:.3f} bits, {shown}", file=sys.stderr, flush=True)

    def _rows(self, form: Form, texts: Sequence[Windows]) -> list[Row]:
        python = form.python(self._options.peers)
        if python is None:
            raise LookupError(f"{form.environment} is not installed (--install-peers)")
        path = form.path(self._folder)
        if form.name.endswith("-imatrix") and not path.exists():
            self._write_statistics()
        form.make(python, self._model, path, fresh=form.environment == FMEDGE)
        nbytes = gguf_matrix_bytes(path) if path.is_file() else onnx_matrix_bytes(path)
        bits = nbytes * 8 / self._parameters
        found = []
        for text in texts:
            self._write_logits(text)
            score = [str(python), str(HERE / form.runner), str(path), str(text.ids), str(text.logits)]
            sums = Sums(**json.loads(run(score)))
            quality = sums.perplexity, sums.other_perplexity, sums.mean_kl, sums.top1_agreement
            found.append(Row(form.name, text.text, nbytes, bits, *quality))
        return found

    def _write_logits(self, text: Windows) -> None:
        if not text.logits.exists():
            partial = text.logits.with_name(f"partial-{text.logits.name}")
            run([sys.executable, str(HERE / "score_torch.py"), str(self._model), str(text.ids), str(partial)])
            partial.rename(text.logits)

    def _write_statistics(self) -> None:
        """What fmedge measures on its calibration text, which is kept."""
        if not self.statistics.exists():
            options = ["--quantize", "int4", "--statistics", str(self.statistics)]
            form = _own("statistics", export_fmedge(options))
            form.make(Path(sys.executable), self._model, form.path(self._folder), fresh=True)


def read_rows(file: Path, key: str) -> list[Row]:
    """The rows of an earlier run, if it was one of the same texts."""
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    return [Row(**json.loads(line)) for line in lines[1:]] if lines and lines[0] == key else []


def work_folder(work: Path, model: Path) -> Path:
    """Of this model with these weights: another model of the same name gets another."""
    digest = hashlib.sha256()
    for path in weight_files(model):
        state = path.stat()
        digest.update(f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}\n".encode())
    return work / f"{model.resolve().name}-{digest.hexdigest()[:8]}"


def windows_of_texts(options: Options, model: Path, folder: Path) -> Iterator[Windows]:
    """The token ids [W, S] of each text, without special tokens. Raises SystemExit."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    for path in options.text or (None,):
        text = _held_out() if path is None else path.read_text("utf-8")
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        count = min(options.tokens, len(ids)) // options.window
        if not count:
            raise SystemExit(f"{path or 'the text'} has {len(ids)} tokens; a window is {options.window}")
        windows = np.array(ids[: count * options.window], np.int64).reshape(count, options.window)
        digest = hashlib.sha256(windows).hexdigest()[:8]
        name = "built-in" if path is None else path.name
        found = Windows(name, folder / f"windows-{digest}.npy", folder / f"logits-{digest}.npy")
        np.save(found.ids, windows)
        yield found


def _held_out() -> str:
    from fmedge.training.corpus import split_documents
    from fmedge.training.python_text import python_documents

    return "\n\n".join(split_documents(python_documents()).validation)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _reason(error: Exception) -> str:
    """One line: the last that a process wrote to its standard error, if it did."""
    lines = (getattr(error, "stderr", None) or "").strip().splitlines()
    return " ".join((lines[-1] if lines else str(error)).split())[:300]


def run(command: Sequence[str]) -> str:
    """The last line that a process prints. Raises subprocess.SubprocessError."""
    # Peers' environments have numpy, and fmedge's sums need nothing else.
    runtimes = str(Path(fmedge_runtimes.__file__).parent.parent)
    paths = [runtimes, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    return (done.stdout.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    main(options_from_arguments())

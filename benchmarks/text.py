"""Speed and memory of text generation: fmedge and its peers side by side, on the same random weights.

    python benchmarks/text.py --only fmedge
    python benchmarks/text.py --install-peers          # once; llama.cpp is compiled, which takes long
    python benchmarks/text.py --models smol135 --batches 1,8 --rounds 3
    python benchmarks/text.py --models smol135 --device cuda
    python benchmarks/text.py --models smol135 --rates 0.5,2 --only fmedge/int4-128,genai/int4-best,llamaserver

Every measurement is a process of its own; peers take turns within a round. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from background import Background
from comma_list import integers, numbers, words
from peers import ENVIRONMENTS, FMEDGE, HERE, Form, all_forms, install
from random_models import SHAPES
from report import Sample, json_line, print_tables, rows_from_samples
from serving import ServingSample, print_serving, serving_line
from traffic import Served, Traffic
from workload import Measurement, Workload, arguments_from_record

LIMIT_S = 600
"""A process that takes longer has failed."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure and where."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    rates: tuple[float, ...]
    requests: int
    slots: int
    block_sizes: tuple[int, ...]
    only: tuple[str, ...]
    rounds: int
    repeats: int
    prompt: int
    new: int
    threads: int
    device: str
    peers: Path
    work: Path
    keep_bundles: bool
    install_peers: bool


@dataclass(frozen=True, slots=True)
class Job:
    """One process to be run in every round."""

    model: str
    form: Form
    python: Path
    workload: Workload | Traffic

    @property
    def name(self) -> str:
        """For messages."""
        workload = self.workload
        what = f"{workload.rate:g} requests/s" if isinstance(workload, Traffic) else f"batch {workload.batch}"
        return f"{self.model} {self.form.name} {what}"


def options_from_arguments() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", type=words, default=tuple(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--batches", type=integers, default=(1, 8, 16))
    parser.add_argument(
        "--rates", type=numbers, default=(), help="serve so many requests per second instead of batches"
    )
    parser.add_argument("--requests", type=int, default=40, help="requests of each rate")
    parser.add_argument("--slots", type=int, default=8, help="requests that may be served together")
    parser.add_argument("--block-sizes", type=integers, default=(32, 64, 128), help="of fmedge's int4")
    parser.add_argument("--only", type=words, default=("",), help="forms whose name begins so, as in fmedge/int4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="measured generations in each process")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated for each prompt")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu", help="cpu; or cuda, for fmedge's own forms")
    parser.add_argument("--peers", type=Path, default=Path("out/peers"), help="environments of the peers")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="models in all their forms")
    parser.add_argument("--keep-bundles", action="store_true", help="do not export fmedge's bundles again")
    parser.add_argument("--install-peers", action="store_true", help="install the peers and stop")
    return Options(**vars(parser.parse_args()))


def main(options: Options) -> None:
    """Make what is missing, measure, report."""
    forms = [form for form in all_forms(options.block_sizes, options.device) if form.name.startswith(options.only)]
    if not options.install_peers:
        forms = [form for form in forms if (form.server if options.rates else form.runner)]
    if options.install_peers:
        install(options.peers, [name for name in ENVIRONMENTS if any(form.environment == name for form in forms)])
        return
    left_out: list[str] = []
    jobs = list(jobs_from_forms(options, forms, left_out))
    samples: list[Sample] = []
    served: list[ServingSample] = []
    for number in range(options.rounds):
        # Every other round runs backwards, so that no form is always the one after a hot or a quiet moment.
        for job in jobs if number % 2 == 0 else reversed(jobs):
            result = run(job, number)
            if isinstance(result, Sample):
                samples.append(result)
            elif isinstance(result, ServingSample):
                served.append(result)
            else:
                left_out.append(result)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = rows_from_samples(samples)
    if options.rates:
        print_serving(served)
    else:
        print_tables(rows)
    for reason in left_out:
        print(f"left out: {reason}")
    if options.rates:
        traffic = {"threads": options.threads, "requests": options.requests, "slots": options.slots}
        print(serving_line(served, {**traffic, "rounds": options.rounds, "left_out": left_out}))
        return
    facts = {
        "threads": options.threads,
        "device": options.device,
        "prompt": options.prompt,
        "new": options.new,
        "rounds": options.rounds,
    }
    print(json_line(rows, {**facts, "repeats": options.repeats, "left_out": left_out}))


def jobs_from_forms(options: Options, forms: Sequence[Form], left_out: list[str]) -> Iterator[Job]:
    """Every form of every model at every batch size; what cannot be made is noted in `left_out`."""
    missing = {form.environment for form in forms if form.python(options.peers) is None}
    left_out += [f"{name}: not installed; python benchmarks/text.py --install-peers" for name in sorted(missing)]
    made: set[Path] = set()
    for model in options.models:
        folder = model_folder(options.work, model)
        for form in forms:
            python = form.python(options.peers)
            if python is None:
                continue
            fresh = form.environment == FMEDGE and not options.keep_bundles
            path = form.path(options.work / model)
            try:
                form.make(python, folder, path, fresh=fresh and path not in made)
            except subprocess.SubprocessError as error:
                left_out.append(f"{model} {form.name}: cannot be made ({_reason(error)})")
                continue
            made.add(path)
            for workload in workloads(options, model, form, path):
                yield Job(model, form, python, workload)


def workloads(options: Options, model: str, form: Form, path: Path) -> Iterator[Workload | Traffic]:
    """What a form of a model is asked to do: batches of each size, or requests at each rate."""
    vocabulary, threads = SHAPES[model].vocabulary, options.threads
    for rate in options.rates:
        yield Traffic(str(path), vocabulary, rate, options.requests, options.slots, threads, options.device)
    for batch in () if options.rates else options.batches:
        yield Workload(
            form=str(path),
            vocabulary=vocabulary,
            batch=batch,
            prompt=options.prompt,
            new=options.new,
            threads=threads,
            repeats=options.repeats,
            mode=form.mode,
            device=options.device,
        )


def model_folder(work: Path, model: str) -> Path:
    """The model in transformers' form, made in a process of its own."""
    folder = work / model / "transformers"
    subprocess.run([sys.executable, HERE / "random_models.py", model, folder], check=True, timeout=LIMIT_S)
    return folder


def run(job: Job, number: int) -> Sample | ServingSample | str:
    """One process; the reason when it fails."""
    serving = isinstance(job.workload, Traffic)
    script = job.form.server if serving else job.form.runner
    command = [str(job.python), str(HERE / script), *arguments_from_record(job.workload)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.workload.threads)}
    try:
        with Background() as background:
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        if isinstance(job.workload, Traffic):
            return ServingSample(job.model, job.workload.rate, job.form.name, number, Served(**found), background.cores)
        return Sample(job.model, job.workload.batch, job.form.name, number, Measurement(**found), background.cores)
    except (subprocess.SubprocessError, ValueError, TypeError, IndexError) as error:
        return f"{job.name}: failed ({_reason(error)})"


def _reason(error: Exception) -> str:
    lines = (getattr(error, "stderr", None) or "").strip().splitlines()
    return lines[-1][:300] if lines else str(error)[:300]


if __name__ == "__main__":
    main(options_from_arguments())

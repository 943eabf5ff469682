"""Speed and memory of text-to-image: fmedge and its peers side by side, on the same weights.

    python benchmarks/image.py --only diffusers/eager,fmedge/none
    python benchmarks/image.py --install-peers                     # once
    python benchmarks/image.py --cases sd15-small --rounds 2
    python benchmarks/image.py --cases sd15-tiny --units images --batches 1,8
    python benchmarks/image.py --cases out/quickstart/painter --batches 1,8,64

A case is a shape with random weights (one step of its UNet, and one decoding) or a folder of `fmedge train image`
(whole images). Every measurement is a process of its own; peers take turns. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from background import Background
from comma_list import integers, words
from image_peers import QUANTIZATIONS, ImageForm, image_forms, python_of
from image_report import ImageSample, image_json, image_rows, print_image_tables
from image_workload import DECODE, IMAGES, STEP, ImageMeasurement, ImageWorkload
from peers import FMEDGE, HERE, install
from random_pipelines import PIXELS, SHAPES
from workload import arguments_from_record

LIMIT_S = 1800
"""A process that takes longer has failed; compiling a UNet takes minutes."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure and where."""

    cases: tuple[str, ...]
    units: tuple[str, ...]
    batches: tuple[int, ...]
    steps: int
    quantize: tuple[str, ...]
    only: tuple[str, ...]
    rounds: int
    repeats: int
    threads: int
    device: str
    peers: Path
    work: Path
    keep_bundles: bool
    install_peers: bool


@dataclass(frozen=True, slots=True)
class Job:
    """One process to be run in every round."""

    case: str
    form: ImageForm
    python: Path
    workload: ImageWorkload

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.case} {self.workload.unit} batch {self.workload.batch} {self.form.form.name}"


def options_from_arguments(arguments: Sequence[str] | None = None) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    shapes = ", ".join(SHAPES)
    parser.add_argument("--cases", type=words, default=("sd15-small", PIXELS), help=f"of {shapes}, or folders")
    parser.add_argument("--units", type=words, default=(STEP, DECODE, IMAGES), help="kinds of work")
    parser.add_argument("--batches", type=integers, default=(1, 8, 64), help="of whole images")
    parser.add_argument("--steps", type=int, default=10, help="of whole images")
    parser.add_argument("--quantize", type=words, default=QUANTIZATIONS, help="of fmedge's bundles")
    parser.add_argument("--only", type=words, default=("",), help="forms whose name begins so, as in fmedge/int8")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="measured runs in each process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu", help="of fmedge's bundles: cpu or cuda")
    parser.add_argument("--peers", type=Path, default=Path("out/peers"), help="environments of the peers")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="pipelines in all their forms")
    parser.add_argument("--keep-bundles", action="store_true", help="do not export fmedge's bundles again")
    parser.add_argument("--install-peers", action="store_true", help="install the peers and stop")
    return Options(**vars(parser.parse_args(arguments)))


def main(options: Options) -> None:
    """Make what is missing, measure, report."""
    forms = [item for item in image_forms(options.quantize, options.device) if item.form.name.startswith(options.only)]
    if options.install_peers:
        install(options.peers, sorted({item.form.environment for item in forms} - {FMEDGE}))
        return
    left_out: list[str] = []
    jobs = list(jobs_from_forms(options, forms, left_out))
    samples: list[ImageSample] = []
    load = [os.getloadavg()[0]]
    for number in range(options.rounds):
        # Every other round runs backwards, so that no form is always the one after a hot or a quiet moment.
        for job in jobs if number % 2 == 0 else reversed(jobs):
            result = run(job)
            if isinstance(result, ImageSample):
                samples.append(result)
            else:
                left_out.append(result)
            load.append(os.getloadavg()[0])
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = image_rows(samples)
    print_image_tables(rows)
    for reason in left_out:
        print(f"left out: {reason}")
    print(f"load average {min(load):.1f} to {max(load):.1f}, {options.threads} threads")
    facts = {"threads": options.threads, "steps": options.steps, "rounds": options.rounds, "repeats": options.repeats}
    print(image_json(rows, {**facts, "load": [min(load), max(load)], "left_out": left_out}))


def jobs_from_forms(options: Options, forms: Sequence[ImageForm], left_out: list[str]) -> Iterator[Job]:
    """Every form of every case at every piece of work; what cannot be made is noted in `left_out`."""
    missing = {item.form.environment for item in forms if python_of(item.form, options.peers) is None}
    left_out += [f"{item.form.name}: needs {item.needs}" for item in forms if item.needs is not None]
    forms = [item for item in forms if item.needs is None]
    left_out += [f"{name}: not installed; python benchmarks/image.py --install-peers" for name in sorted(missing)]
    for case in options.cases:
        folder = case_folder(options.work, case)
        for item in forms:
            python = python_of(item.form, options.peers)
            workloads = list(case_workloads(options, case, item))
            if python is None or not workloads:
                continue
            path = item.form.path(options.work / Path(case).name)
            own = item.form.peer == FMEDGE
            try:
                if item.form.peer == "diffusers":
                    path = folder
                else:
                    item.form.make(python, folder, path, fresh=own and not options.keep_bundles)
            except subprocess.SubprocessError as error:
                left_out.append(f"{case} {item.form.name}: cannot be made ({_reason(error)})")
                continue
            for workload in workloads:
                yield Job(case, item, python, replace(workload, form=str(path)))


def case_folder(work: Path, case: str) -> Path:
    """The pipeline in diffusers' form; random ones are made in a process of their own."""
    if case not in SHAPES:
        return Path(case).absolute()
    folder = work / case / "diffusers"
    subprocess.run([sys.executable, HERE / "random_pipelines.py", case, folder], check=True, timeout=LIMIT_S)
    return folder.absolute()


def case_workloads(options: Options, case: str, item: ImageForm) -> Iterator[ImageWorkload]:
    """What a form is asked to do with a case."""
    shape = SHAPES.get(case, SHAPES[PIXELS])
    if shape is SHAPES[PIXELS] and not item.pixels:
        return
    common = {"form": "", "side": shape.side, "context": shape.context, "threads": options.threads}
    common |= {"repeats": options.repeats, "mode": item.form.mode, "steps": options.steps}
    # diffusers computes on the CPU what outputs are compared with.
    common |= {"device": options.device if item.form.peer == FMEDGE else "cpu"}
    for unit in options.units:
        if unit in shape.units and unit in item.units:
            batches = [batch for batch in options.batches if batch <= shape.most_images] if unit == IMAGES else [1]
            for batch in batches:
                yield ImageWorkload(unit=unit, batch=batch, **common)


def run(job: Job) -> ImageSample | str:
    """One process; the reason when it fails."""
    command = [str(job.python), str(HERE / job.form.form.runner), *arguments_from_record(job.workload)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.workload.threads)}
    try:
        with Background() as background:
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
        measured = ImageMeasurement(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (subprocess.SubprocessError, ValueError, TypeError, IndexError) as error:
        return f"{job.name}: failed ({_reason(error)})"
    workload = job.workload
    return ImageSample(job.case, workload.unit, workload.batch, job.form.form.name, measured, background.cores)


def _reason(error: Exception) -> str:
    lines = (getattr(error, "stderr", None) or "").strip().splitlines()
    return lines[-1][:300] if lines else str(error)[:300]


if __name__ == "__main__":
    main(options_from_arguments())

"""Options and models that many tests share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER and hasattr(os, "sched_setaffinity"):
    # A core for each worker, before a library counts them: two pools of threads on the same cores wait for each other.
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(WORKER.removeprefix("gw")) % len(_cores)]})

ENDS = ("bos_token_id", "eos_token_id", "_name_or_path", "transformers_version", "architectures")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|begin|>{{ message.role }}: {{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant: {% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-gpu", action="store_true", help="run the tests that need an NVIDIA GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-gpu"):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: make test-gpu"))


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that all workers share, made by the one that needs it first. Tests that change it copy it."""
    # A worker's folder lies in that of the run.
    shared = tmp_path_factory.getbasetemp().parent if WORKER else tmp_path_factory.getbasetemp()
    folder, made = shared / name, shared / f"{name}.made"
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a chat template."""
    from models import add_tokenizer, make_model

    return made_once(
        tmp_path_factory,
        "tiny-llama",
        lambda folder: add_tokenizer(make_model(folder, eos_token_id=0), chat_template=CHAT_TEMPLATE),
    )


@pytest.fixture(scope="session")
def bundle(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as an fp32 bundle, fully verified."""
    from fmedge_converters.export import export
    from fmedge_converters.export_options import ExportOptions

    return made_once(tmp_path_factory, "llama-bundle", lambda folder: export(ExportOptions(str(llama), folder)))


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Stable Diffusion and its bundle, not verified."""
    from fmedge_converters.export import export
    from fmedge_converters.export_options import ExportOptions
    from tiny_diffusers import save_pipeline

    source = made_once(tmp_path_factory, "tiny-sd", lambda folder: save_pipeline("sd", folder))
    options = ExportOptions(str(source), source.with_name("sd-bundle"), verify="none")
    return source, made_once(tmp_path_factory, options.output.name, lambda _: export(options))


@pytest.fixture(scope="session")
def pixel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny pipeline in pixels, as training writes one, and its bundle, fully verified."""
    from fmedge_converters.export import export
    from fmedge_converters.export_options import ExportOptions
    from tiny_diffusers import PIXEL, save_pipeline

    source = made_once(tmp_path_factory, "tiny-pixel", lambda folder: save_pipeline(PIXEL, folder))
    return source, made_once(
        tmp_path_factory, "pixel-bundle", lambda folder: export(ExportOptions(str(source), folder))
    )


@pytest.fixture(scope="session")
def traces() -> dict[Any, Any]:
    return {}


@pytest.fixture
def traced_once(traces: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the same configuration share a trace, which is most of the work for a tiny model.

    Not for tests of the trace itself, nor of models with buffers of their own in the checkpoint.
    """
    share_traces(traces, monkeypatch)


def share_traces(traces: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `traced_once` does, for fixtures of any scope."""
    from fmedge_converters import build

    trace = build.trace_by_layers

    def trace_once(config: Any, dialect: Any, dtype: Any, context: int, *others: Any) -> Any:
        # What ends a text is no part of a graph.
        settings = {name: value for name, value in config.to_dict().items() if name not in ENDS}
        key = (json.dumps(settings, sort_keys=True, default=str), dialect.name, dtype, context)
        if key not in traces:
            traces[key] = trace(config, dialect, dtype, context, *others)
        return replace(traces[key], model=traces[key].model.clone())

    monkeypatch.setattr(build, "trace_by_layers", trace_once)

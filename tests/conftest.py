"""Options and models that many tests share."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER and hasattr(os, "sched_setaffinity"):
    # A core for each worker, before a library counts them: two pools of threads on the same cores wait for each other.
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(WORKER.removeprefix("gw")) % len(_cores)]})

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


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a chat template."""
    from models import add_tokenizer, make_model

    folder = make_model(tmp_path_factory.mktemp("llama") / "tiny-llama", eos_token_id=0)
    return add_tokenizer(folder, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def bundle(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as an fp32 bundle, fully verified."""
    from fmedge_converters.export import export
    from fmedge_converters.export_options import ExportOptions

    return export(ExportOptions(str(llama), tmp_path_factory.mktemp("bundle") / "bundle")).folder


@pytest.fixture(scope="session")
def traces() -> dict[Any, Any]:
    return {}


@pytest.fixture
def traced_once(traces: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the same configuration share a trace, which is most of the work for a tiny model."""
    share_traces(traces, monkeypatch)


def share_traces(traces: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `traced_once` does, for fixtures of any scope."""
    from fmedge_converters import build

    trace = build.trace_by_layers

    def trace_once(config: Any, dialect: Any, dtype: Any, context: int, *others: Any) -> Any:
        key = (config.to_json_string(), dialect.name, dtype, context)
        if key not in traces:
            traces[key] = trace(config, dialect, dtype, context, *others)
        return replace(traces[key], model=traces[key].model.clone())

    monkeypatch.setattr(build, "trace_by_layers", trace_once)

"""What a model's products get as inputs, feature by feature, in a file that later exports can use.

A safetensors file: for each matrix the mean square and the largest magnitude of its input features, and in the
metadata what they were measured on. Matrices with the same input share their tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from fmedge_runtimes.errors import ExportError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from fmedge_converters.calibration.linear_inputs import Inputs, Place
from fmedge_converters.checkpoint import Files

METADATA = "fmedge_statistics"
CHUNK = 1 << 20
WEIGHTS = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of the input features of one matrix, or of several with the same input."""

    tokens: int
    mean_square: torch.Tensor  # [K]
    largest: torch.Tensor  # [K]


@dataclass(frozen=True, slots=True)
class StatisticsKey:
    """What statistics depend on: they are those of another export if all of it is the same."""

    architecture: str
    """SHA-256 of the configuration."""
    weights: str
    """SHA-256 of the files that hold the weights."""
    adapter: str
    text: str
    """SHA-256 of the token ids."""
    tokens: int


def statistics_key(config: PretrainedConfig, files: Files, text: str, tokens: int) -> StatisticsKey:
    """The key for a source and token ids of that SHA-256. Reads the weights once."""
    settings = json.dumps(config.to_dict(), sort_keys=True, default=str)
    adapter = "" if files.adapter is None else _digest(files.adapter)
    return StatisticsKey(hashlib.sha256(settings.encode()).hexdigest(), _digest(files.weights), adapter, text, tokens)


def _digest(source: Path) -> str:
    """Of a file, or of the files with weights in a folder."""
    digest = hashlib.sha256()
    found = [source] if source.is_file() else sorted(path for path in source.iterdir() if path.suffix in WEIGHTS)
    for path in found:
        digest.update(f"{path.name if source.is_dir() else ''}:{path.stat().st_size}:".encode())
        with path.open("rb") as file:
            while block := file.read(CHUNK):
                digest.update(block)
    return digest.hexdigest()


def statistics_of(found: list[Inputs]) -> dict[Place, Statistics]:
    """By matrix."""
    result = {}
    for inputs in found:
        shared = Statistics(inputs.tokens, inputs.mean_square, inputs.largest)
        result.update(dict.fromkeys(inputs.matrices, shared))
    return result


def write_statistics(path: Path, key: StatisticsKey, statistics: Mapping[Place, Statistics]) -> None:
    """Write a file that appears whole or not at all. Raises ExportError."""
    groups: dict[int, tuple[Statistics, list[Place]]] = {}
    for place, one in statistics.items():
        groups.setdefault(id(one), (one, []))[1].append(place)
    tensors, listed = {}, []
    for number, (one, places) in enumerate(groups.values()):
        tensors[f"{number}.mean_square"], tensors[f"{number}.largest"] = one.mean_square, one.largest
        listed.append({"tokens": one.tokens, "matrices": [[place.parameter, place.expert] for place in places]})
    metadata = {METADATA: json.dumps({"key": asdict(key), "inputs": listed})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, partial, metadata)
            Path(partial).replace(path)
        finally:
            Path(partial).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write the statistics {path}: {error}.") from error


def read_statistics(path: Path, key: StatisticsKey) -> dict[Place, Statistics]:
    """Raises ExportError when it is no such file, or what it was measured on is something else."""
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})[METADATA])
            _require_equal(path, told["key"], key)
            found = {}
            for number, inputs in enumerate(told["inputs"]):
                one = Statistics(
                    inputs["tokens"], file.get_tensor(f"{number}.mean_square"), file.get_tensor(f"{number}.largest")
                )
                found.update({Place(parameter, expert): one for parameter, expert in inputs["matrices"]})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{path} is no file of statistics that fmedge wrote ({error}); name another --statistics."
        ) from error
    return found


def _require_equal(path: Path, told: Mapping[str, object], key: StatisticsKey) -> None:
    differing = [field.name for field in fields(key) if told.get(field.name) != getattr(key, field.name)]
    if differing:
        raise ExportError(
            f"{path} holds statistics of another export: {' and '.join(differing)} differ; repeat that export's source "
            "and --calibrate options, or name another --statistics."
        )

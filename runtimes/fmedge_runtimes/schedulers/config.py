"""The config of a scheduler: `scheduler_config.json` as diffusers writes it, and the table that may lie beside it.

Everything in it is understood or refused by name: a field of the scheduler must have a value that is implemented; a
field of another of diffusers' schedulers is kept for when that one is chosen instead; any other field is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from fmedge_runtimes.errors import BundleError, BundleFormatError, RequestError
from fmedge_runtimes.schedulers.flow_match_euler import FlowMatchEulerSettings
from fmedge_runtimes.schedulers.names import BY_NAME, NAMES
from fmedge_runtimes.schedulers.noise_schedule import NoiseSchedule, alphas_cumprod
from fmedge_runtimes.schedulers.registry import FOREIGN_FIELDS, SCHEDULERS, SWITCHABLE
from fmedge_runtimes.schedulers.scheduler import Array
from fmedge_runtimes.schedulers.settings import BetaSettings, Settings, ShiftSettings
from fmedge_runtimes.schedulers.unclip import UnCLIPSettings

CONFIG = "scheduler_config.json"
TABLE = "alphas_cumprod.npy"

# What diffusers writes besides the fields.
_WRITTEN = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "_use_default_values"})


@dataclass(frozen=True)
class SchedulerConfig:
    """A scheduler's class, its checked fields, and all fields of the file it came from."""

    class_name: str
    """diffusers' name of the class."""
    settings: Settings
    values: Mapping[str, Any]
    """As written, other schedulers' fields included; defaults are not filled in."""
    alphas_cumprod: Array | None = field(default=None, compare=False)
    """The table of cumulated alphas, float32 [T], that torch made; None: it is computed."""

    @property
    def flow(self) -> bool:
        """Whether the model is one of flow matching."""
        settings = self.settings
        return isinstance(settings, FlowMatchEulerSettings) or (
            isinstance(settings, ShiftSettings) and settings.use_flow_sigmas
        )


def read_config(path: Path) -> SchedulerConfig:
    """Read scheduler_config.json, or a folder that holds it, and alphas_cumprod.npy if it is there.

    Raises BundleError when there is no such file, BundleFormatError when something in it is not understood.
    """
    path = path / CONFIG if path.is_dir() else path
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BundleFormatError(f"{path} is not JSON ({error}); copy or export the bundle again.") from error
    if not isinstance(values, dict):
        raise BundleFormatError(f"{path} is not a JSON object; copy or export the bundle again.")
    config = parse_config(values, str(path))
    table = path.with_name(TABLE)
    return with_table(config, _read_table(table), str(table)) if table.exists() else config


def parse_config(values: Mapping[str, Any], where: str = "the scheduler's config") -> SchedulerConfig:
    """Check the fields of a config. Raises BundleFormatError naming the field and what works."""
    class_name = values.get("_class_name")
    if not isinstance(class_name, str) or class_name not in SCHEDULERS:
        found = "has no _class_name" if class_name is None else f"is for {class_name}, which is not supported"
        raise BundleFormatError(f"{where} {found}; supported are {', '.join(SCHEDULERS)}.")
    own = SCHEDULERS[class_name].settings.model_fields
    every = (name for row in SCHEDULERS.values() for name in row.settings.model_fields)
    known = {*every, *FOREIGN_FIELDS, *_WRITTEN}
    unknown = sorted(set(values) - known)
    if unknown:
        raise BundleFormatError(
            f"{where}: unknown field {unknown[0]}; {class_name} has {', '.join(own)}. Remove it, or update fmedge."
        )
    unwritten = values.get("_use_default_values")
    defaults = unwritten if isinstance(unwritten, list) else []
    kept = {name: value for name, value in values.items() if not name.startswith("_") and name not in defaults}
    try:
        return SchedulerConfig(class_name, _settings(class_name, kept), kept)
    except ValidationError as error:
        raise BundleFormatError(f"{where}: {_first(error)}.") from error


def with_table(config: SchedulerConfig, table: Array, where: str = "alphas_cumprod") -> SchedulerConfig:
    """The config with a table of cumulated alphas. Raises BundleFormatError when it cannot be that of the config."""
    schedule = noise_schedule(config.settings)
    if schedule is None:
        raise BundleFormatError(f"{where}: {config.class_name} has no such table; remove the file.")
    if table.dtype != np.float32 or table.shape != (schedule.size,):
        raise BundleFormatError(
            f"{where} is {table.dtype} {list(table.shape)}, not float32 [{schedule.size}]; export the bundle again."
        )
    if not np.allclose(table, alphas_cumprod(schedule), rtol=1e-3, atol=1e-6):  # NaN is close to nothing
        raise BundleFormatError(f"{where} is not the table of the config's betas; export the bundle again.")
    table = table.copy()
    table.flags.writeable = False
    return replace(config, alphas_cumprod=table)


def switch(config: SchedulerConfig, name: str) -> SchedulerConfig:
    """The config of another scheduler for the same model: by a name of `NAMES` or by diffusers' class name.

    As diffusers' `from_config`: fields that the other class has are taken over, its other fields get their defaults.
    Raises RequestError when the name is unknown or the scheduler does not fit the model.
    """
    row = BY_NAME.get(name)
    class_name = row.class_name if row else name
    if class_name not in SCHEDULERS:
        raise RequestError(f"unknown scheduler {name}; known are {', '.join(BY_NAME)}.")
    if class_name == config.class_name and not (row and row.fields):
        return config
    fitting = _fitting(config)
    if class_name not in fitting:
        names = ", ".join(row.name for row in NAMES if row.class_name in fitting)
        works = f"use one of {names}" if names else "leave the scheduler as it is"
        raise RequestError(f"the scheduler {name} does not fit a model with {config.class_name}; {works}.")
    values = {**config.values, **_translated(config, class_name), **(row.fields if row else {})}
    try:
        settings = _settings(class_name, values)
    except ValidationError as error:
        raise RequestError(f"the scheduler {name} cannot take over the bundle's config: {_first(error)}.") from error
    same = noise_schedule(settings) == noise_schedule(config.settings)
    return SchedulerConfig(class_name, settings, values, config.alphas_cumprod if same else None)


def noise_schedule(settings: Settings) -> NoiseSchedule | None:
    """What determines the table of cumulated alphas; None where there is none."""
    return settings.noise_schedule if isinstance(settings, BetaSettings | UnCLIPSettings) else None


def _fitting(config: SchedulerConfig) -> frozenset[str]:
    if config.class_name not in SWITCHABLE and not config.flow:
        return frozenset({config.class_name})
    if not config.flow:
        return SWITCHABLE
    return frozenset(
        name for name, row in SCHEDULERS.items() if issubclass(row.settings, ShiftSettings | FlowMatchEulerSettings)
    )


def _translated(config: SchedulerConfig, class_name: str) -> dict[str, Any]:
    """What the two ways to write a flow-matching model call the same thing."""
    settings = config.settings
    if isinstance(settings, FlowMatchEulerSettings) and class_name in SWITCHABLE:
        return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": settings.shift}
    if isinstance(settings, ShiftSettings) and class_name not in SWITCHABLE:
        return {"shift": settings.flow_shift}
    return {}


def _settings(class_name: str, values: Mapping[str, Any]) -> Settings:
    kind = SCHEDULERS[class_name].settings
    own = {name: value for name, value in values.items() if name in kind.model_fields}
    # From JSON, where a list is a tuple; Infinity and NaN are as Python writes them.
    return kind.model_validate_json(json.dumps(own))


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=True)[0]
    where = ".".join(str(part) for part in first["loc"])
    words = first["msg"].removeprefix("Value error, ")
    return f"{where} {first['input']!r} is not supported: {words}" if where else words


def _read_table(path: Path) -> Array:
    try:
        table: Array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, EOFError) as error:
        raise BundleFormatError(f"{path} is not a table of numpy's ({error}); export the bundle again.") from error
    if not isinstance(table, np.ndarray):
        raise BundleFormatError(f"{path} is not a table of numpy's; export the bundle again.")
    return table

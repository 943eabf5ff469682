"""A LoRA for the parts of a pipeline, merged into their weights while these are read.

Files of diffusers, of PEFT and of kohya's trainers name the same updates in different ways; diffusers' own functions
bring them into one form. The numbers are those of diffusers' `load_lora_weights` and `fuse_lora`, within the rounding
of a product.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from fmedge_runtimes.errors import SourceError
from safetensors import SafetensorError, safe_open

from fmedge_converters.adapter import by_pattern
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.parts.part import Call
from fmedge_converters.weight import Array, Weight

ENDS = (".lora_A.weight", ".lora_B.weight")
DOWN = (".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight", ".down.weight")
"""Ends of the names of the first matrix, behind what alphas are named by."""
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings in the file."""
OTHER_KINDS = ("dora_scale", "lora_magnitude_vector", "hada_", "lokr_", "oft_", "lora_mid")
"""What is in the names of tensors of adapters that are more than a product of two matrices."""


@dataclass(frozen=True, slots=True)
class Update:
    """What is added to one weight: scale * B @ A, where a kernel's axes count as one."""

    a: Array  # [r, K]
    b: Array  # [N, r]
    scale: float

    def merged(self, weight: Weight, where: str) -> Weight:
        """The weight with the update. Raises SourceError when it does not fit."""
        rows = weight.shape[0]
        columns = int(np.prod(weight.shape[1:]))
        if len(weight.shape) < 2 or self.b.shape[0] != rows or self.a.shape[1] != columns:
            size = [self.b.shape[0], self.a.shape[1]]
            raise SourceError(
                f"{where} is an update for a weight of {size}, the model's has shape {list(weight.shape)}: the LoRA "
                "belongs to another model."
            )

        def read(start: int, stop: int) -> Array:
            base = weight.read(start, stop).astype(np.float32)
            update = (self.b[start:stop] @ self.a) * np.float32(self.scale)
            result: Array = (base + update.reshape(base.shape)).astype(weight.dtype)
            return result

        return Weight(weight.shape, weight.dtype, read)


class ImageAdapter:
    """The updates of a LoRA, by part and parameter."""

    def __init__(
        self, path: Path, pipeline: str, scale: float, parts: Sequence[str], unet: torch.nn.Module | None
    ) -> None:
        """Read a safetensors file, or the one of a folder; `unet` is the module of that part, None if there is none.

        Raises SourceError: it is damaged, is no LoRA for such a pipeline, or is of a kind that cannot be merged.
        """
        self.file = _file(path)
        state, settings = self._state(pipeline, unet)
        self._updates: dict[str, dict[str, Update]] = {name: {} for name in parts}
        for part, tensors in self._by_part(state, parts).items():
            converted = self._converted(part, tensors)
            for module in sorted({key.removesuffix(end) for key in converted for end in ENDS if key.endswith(end)}):
                own = {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(part)}
                self._updates[part][module] = self._update(converted, module, own, scale)
        if not any(self._updates.values()):
            raise SourceError(f"{self.file} holds no LoRA: none of its {len(state)} tensors has a name that says so.")

    def _state(self, pipeline: str, unet: torch.nn.Module | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by the names that diffusers has for them, alphas multiplied in; and PEFT's settings of each part."""
        try:
            with safe_open(self.file, framework="pt") as opened:
                raw = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
                settings = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            raise SourceError(f"{self.file} is damaged or is not safetensors ({error}); copy it again.") from error
        other = next((key for key in raw if any(kind in key for kind in OTHER_KINDS)), None)
        if other is not None:
            raise SourceError(f"{self.file}: {other} says that it is no plain LoRA; fmedge merges those only.")
        kind: Any = getattr(diffusers, pipeline, None)
        if not hasattr(kind, "lora_state_dict"):
            raise SourceError(f"diffusers' {pipeline} takes no LoRA; leave --adapter out.")
        options = {} if unet is None else {"unet_config": unet.config}
        try:
            with quiet_libraries():
                found = kind.lora_state_dict(raw, **options)
        except Exception as error:  # whatever an unknown form makes diffusers raise
            raise SourceError(f"{self.file}: diffusers does not know the form of this LoRA: {error}") from error
        state, alphas = found if isinstance(found, tuple) else (found, None)
        scaled = dict(state)
        for key, alpha in (alphas or {}).items():
            stem = key.removesuffix(".alpha")
            name = next((name for name in (stem, *(stem + end for end in DOWN)) if name in scaled), None)
            if name is not None:
                scaled[name] = scaled[name] * (float(alpha) / scaled[name].shape[0])
        return scaled, settings

    def _by_part(self, state: Mapping[str, torch.Tensor], parts: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            part = next((name for name in parts if key.startswith(f"{name}.")), None)
            if part is None:
                raise SourceError(f"{self.file} changes {key}, and the pipeline has no such part ({', '.join(parts)}).")
            found.setdefault(part, {})[key.removeprefix(f"{part}.")] = value
        return found

    def _converted(self, part: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a part by PEFT's names."""
        if any(key.endswith(ENDS) for key in tensors):
            return tensors
        try:
            if part.startswith("text_encoder"):
                return dict(convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors)))
            return dict(convert_unet_state_dict_to_peft(tensors))
        except ValueError as error:
            raise SourceError(f"{self.file}: diffusers does not know the form of this LoRA: {error}") from error

    def _update(
        self, state: Mapping[str, torch.Tensor], module: str, settings: Mapping[str, Any], scale: float
    ) -> Update:
        a, b = (state.get(module + end) for end in ENDS)
        if a is None or b is None:
            raise SourceError(f"{self.file}: {module} lacks one of its two matrices; copy the LoRA again.")
        rank = a.shape[0]
        if settings:
            alpha = float(by_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", rank)))
            scale *= alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        return Update(
            a.to(torch.float32).reshape(rank, -1).numpy(), b.to(torch.float32).reshape(b.shape[0], -1).numpy(), scale
        )

    def of(self, part: str) -> Mapping[str, Update]:
        """The updates of a part, by the names of its layers."""
        return self._updates.get(part, {})

    def updated(self, part: str, weights: Mapping[str, Weight]) -> dict[str, tuple[Update, Weight]]:
        """The updates of a part with the weights that they change, by parameter.

        Raises SourceError for an update of what the part does not have.
        """
        found = {}
        for module, update in self.of(part).items():
            names = (f"{module}.weight", f"{module.removeprefix('text_model.')}.weight")
            name = next((name for name in names if name in weights), None)
            if name is None:
                raise SourceError(
                    f"{self.file} changes {module} of {part}, which the model does not have: the LoRA belongs to "
                    "another model."
                )
            found[name] = update, weights[name]
        return found

    def applied(self, part: str, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """The weights of a part with their updates. Raises SourceError for one that does not fit."""
        changed = {
            name: update.merged(weight, f"{self.file}: {name.removesuffix('.weight')}")
            for name, (update, weight) in self.updated(part, weights).items()
        }
        return {**weights, **changed}

    def attach(self, part: str, module: torch.nn.Module) -> None:
        """Nothing is added to a module whose weights are changed."""

    def call(self, part: str, call: Call) -> Call:
        """A part with other weights is called as ever."""
        del part
        return call

    def check_used(self, part: str, parameters: Iterable[str]) -> None:
        """Weights that are changed are those that the graph has."""

    def merge(self, part: str, module: torch.nn.Module) -> None:
        """Add the updates of a part to its module, by PyTorch."""
        with torch.no_grad():
            for name, update in self._updates.get(part, {}).items():
                names = (name, name.removeprefix("text_model."))
                owner = next(found for other, found in module.named_modules() if other in names)
                product = torch.from_numpy(update.b) @ torch.from_numpy(update.a) * update.scale
                owner.weight += product.reshape(owner.weight.shape).to(owner.weight.dtype)


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    preferred = [
        file for file in files if file.name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
    ]
    if not files:
        raise SourceError(f"{path} is no LoRA: there is no .safetensors file.")
    if len(files) > 1 and not preferred:
        raise SourceError(f"{path} holds {len(files)} safetensors files; give the one that is the LoRA.")
    return (preferred or files)[0]

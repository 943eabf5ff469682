"""A LoRA adapter, as PEFT saves it, merged into a model's weights while they are read.

    W' = W + scale * B @ A                                        LoRA, https://arxiv.org/abs/2106.09685
    W' = m * (W + scale * B @ A) / norm(W + scale * B @ A)        DoRA, https://arxiv.org/abs/2402.09353

scale is alpha / r, or alpha / sqrt(r) with rank stabilisation (https://arxiv.org/abs/2312.03732). The numbers are
those of PEFT's merge_and_unload, within the rounding of a product.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fmedge_runtimes.errors import SourceError
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fmedge_converters.containers import open_adapter_tensors
from fmedge_converters.formats.plain import FLOATS, plain_weight
from fmedge_converters.stored import StoredTensor
from fmedge_converters.weight import Array, Weight

CONFIG = "adapter_config.json"
OTHER_KINDS = (
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of a LoRA that make more of it than low-rank updates."""
INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starting points that change the base model's weights too, which the adapter does not hold."""
LOW_RANK = re.compile(
    r"(?P<module>.+?)(?P<nesting>(\.base_layer)*)"
    r"\.(?P<part>lora_A|lora_B|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")

Change = Callable[[Weight], Weight]
"""What an adapter makes of one tensor. Raises SourceError when their shapes do not belong together."""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder.

    Raises SourceError when it is damaged, or when the adapter is of a kind that cannot be merged.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
        kind = str(config["peft_type"])
    except FileNotFoundError as error:
        raise SourceError(f"{folder} has no {CONFIG}: it is not an adapter that PEFT saved.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is not a PEFT configuration ({error}); copy the adapter again.") from error
    if kind != "LORA":
        raise SourceError(f"{folder} is an adapter of type {kind}; fmedge merges LoRA and DoRA only.")
    others = [name for name in OTHER_KINDS if config.get(name)]
    if others:
        raise SourceError(f"{folder} is a LoRA with {others[0]}, which fmedge cannot merge into the weights.")
    start = str(config.get("init_lora_weights") or "").lower()
    if start.startswith(INITIALISATIONS):
        raise SourceError(
            f"{folder} is a LoRA that started from {start}, which changed the base model's weights as well; convert "
            "it with PEFT (save_pretrained with path_initial_model_for_weight_conversion), then export."
        )
    return dict(config)


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one module."""

    where: str
    """Adapter and module, for messages."""
    a: StoredTensor  # [r, K], of E experts [E * r, K]
    b: StoredTensor  # [N, r], of E experts [N, r * E]
    bias: StoredTensor | None  # [N]
    magnitude: StoredTensor | None  # [N]
    alpha: float
    rank: int
    stabilised: bool

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether this is an update of a tensor of that shape, as it stands or transposed."""
        (a_rows, columns), (rows, b_columns) = self.a.shape, self.b.shape
        experts = shape[0] if len(shape) == 3 else 1
        return (
            len(shape) in (2, 3)
            and a_rows == b_columns == self.rank * experts
            and shape[-2:] in ((rows, columns), (columns, rows))
        )

    def merged(self, weight: Weight, *, turned: bool) -> Weight:
        """The weight with the update; `turned` if the module keeps it transposed, [K, N].

        Raises SourceError when the update does not fit.
        """
        size = (self.a.shape[1], self.b.shape[0]) if turned else (self.b.shape[0], self.a.shape[1])
        if not self.fits(weight.shape) or weight.shape[-2:] != size:
            raise SourceError(
                f"{self.where} is an update of rank {self.rank} for a tensor of shape {list(size)}, the model's has "
                f"shape {list(weight.shape)}: the adapter belongs to another model, or its tensors are damaged."
            )

        def updated(start: int, stop: int) -> Array:
            rows: Array = weight.read(start, stop).astype(np.float32)
            a, b = _float32(self.a), _float32(self.b)
            if len(weight.shape) == 2:
                left, right = (a.T, b.T) if turned else (b, a)
                rows += left[start:stop] @ right * np.float32(self.scale)
                return rows
            experts = weight.shape[0]
            for expert in range(start, stop):
                product = b[:, expert::experts] @ a[expert * self.rank : (expert + 1) * self.rank]  # [N, K]
                rows[expert - start] += (product.T if turned else product) * np.float32(self.scale)
            return rows

        if self.magnitude is None:
            return Weight(
                weight.shape, weight.dtype, lambda start, stop: updated(start, stop).astype(weight.dtype, copy=False)
            )
        whole = Weight(weight.shape, np.dtype(np.float32), updated)
        return _with_magnitude(whole, self.magnitude, weight.dtype, axis=0 if turned else 1)

    def shifted(self, bias: Weight) -> Weight:
        """The module's bias with the one of the update."""
        if self.bias is None or bias.shape != self.bias.shape:
            raise SourceError(f"{self.where}: its lora_B.bias does not fit the model's bias {list(bias.shape)}.")
        added = _float32(self.bias) * np.float32(self.scale)

        def read(start: int, stop: int) -> Array:
            total: Array = (bias.read(start, stop).astype(np.float32) + added[start:stop]).astype(bias.dtype)
            return total

        return Weight(bias.shape, bias.dtype, read)


def _with_magnitude(weight: Weight, magnitude: StoredTensor, dtype: np.dtype[np.generic], axis: int) -> Weight:
    """DoRA: each output has the norm that was trained for it; norms are taken along the input's `axis`."""
    outputs = weight.shape[1 - axis]
    if math.prod(magnitude.shape) != outputs:
        raise SourceError(f"{magnitude.file}: {magnitude.name} has shape {list(magnitude.shape)}, not [{outputs}].")

    @functools.cache
    def column_norms() -> Array:
        squares = sum((np.square(rows, dtype=np.float64).sum(0) for rows in weight.blocks()), np.zeros(outputs))
        norms: Array = np.sqrt(squares)
        return norms

    def read(start: int, stop: int) -> Array:
        rows = weight.read(start, stop)
        wanted = _float32(magnitude).reshape(-1)
        if axis == 1:
            norms = np.sqrt(np.square(rows, dtype=np.float64).sum(1))
            factors = (wanted[start:stop] / norms)[:, None]
        else:
            factors = (wanted / column_norms())[None, :]
        result: Array = (rows * factors.astype(np.float32)).astype(dtype)
        return result

    return Weight(weight.shape, dtype, read)


def _float32(tensor: StoredTensor) -> Array:
    array: Array = tensor.read(0, tensor.shape[0]).to(torch.float32).numpy()
    return array


class Adapter:
    """The changes that a PEFT folder asks for."""

    def __init__(self, folder: Path, stack: ExitStack, *, allow_pickle: bool = False) -> None:
        """Open the adapter; `stack` closes its files.

        Raises SourceError: it cannot be merged, it is damaged.
        """
        self.folder = folder
        self.config = read_adapter_config(folder)
        self.replaced: dict[str, StoredTensor] = {}
        """Tensors that were trained whole."""
        self.updates: list[tuple[str, LowRank]] = []
        """Low-rank updates, each with the name of its module."""
        parts: dict[tuple[str, int], dict[str, StoredTensor]] = defaultdict(dict)
        for key, tensor in open_adapter_tensors(folder, stack, allow_pickle=allow_pickle).items():
            name = key.removeprefix("base_model.model.")
            match = LOW_RANK.fullmatch(name)
            if tensor.dtype not in FLOATS or (match is None and ("lora_" in name or "token_adapter" in name)):
                raise SourceError(f"{tensor.file}: fmedge does not know what {key} ({tensor.dtype}) means in a LoRA.")
            if match is None:
                self.replaced[WRAPPERS.sub("", name)] = tensor
            else:
                part = match["part"].replace("lora_embedding_", "lora_")
                parts[match["module"], match["nesting"].count(".")][part] = tensor
        for (module, _), found in parts.items():
            self.updates.append((module, self._update(module, found)))
        if not self.replaced and not self.updates:
            raise SourceError(f"{folder} holds no tensors; copy the adapter again.")

    def _update(self, module: str, parts: Mapping[str, StoredTensor]) -> LowRank:
        where = f"{self.folder}: {module}"
        if "lora_A" not in parts or "lora_B" not in parts:
            raise SourceError(f"{where} lacks its lora_{'A' if 'lora_B' in parts else 'B'}; copy the adapter again.")
        a, b = parts["lora_A"], parts["lora_B"]
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise SourceError(f"{where} has factors of shapes {list(a.shape)} and {list(b.shape)}, not matrices.")
        config = self.config
        try:
            rank = int(by_pattern(config.get("rank_pattern"), module, config["r"]))
            alpha = float(by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
        except (KeyError, TypeError, ValueError, re.error) as error:
            raise SourceError(f"{self.folder / CONFIG}: r and lora_alpha are no numbers ({error}).") from error
        if rank < 1:
            raise SourceError(f"{self.folder / CONFIG}: r is {rank}; it must be at least 1.")
        stabilised = bool(config.get("use_rslora"))
        return LowRank(
            where, a, b, parts.get("lora_B.bias"), parts.get("lora_magnitude_vector"), alpha, rank, stabilised
        )

    def names(self) -> set[str]:
        """The tensors that change, as the adapter names them; of experts, their module."""
        return set(self.replaced) | {f"{module}.weight" for module, _ in self.updates}

    def changes(self, model: PreTrainedModel, dtype: np.dtype[np.generic]) -> dict[str, list[Change]]:
        """What becomes of each tensor, by its name in the model; in the order in which changes apply.

        A name that the model does not have is one of the checkpoint: transformers used to load such tensors without
        merging them, and adapters of that time name them so.
        """
        changes: dict[str, list[Change]] = defaultdict(list)
        for name, tensor in self.replaced.items():
            changes[name].append(functools.partial(self._replaced, tensor, dtype))
        for module, update in self.updates:
            name, turned = _target(model, module, update)
            changes[name].append(functools.partial(update.merged, turned=turned))
            if update.bias is not None:
                changes[f"{module}.bias"].append(update.shifted)
        return dict(changes)

    def applied(self, changes: Mapping[str, Sequence[Change]], weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """The weights with the changes that are asked for.

        Raises SourceError when one of them is for a weight that is not there, or does not fit.
        """
        changed = dict(weights)
        for name, steps in changes.items():
            if name not in changed:
                base = self.config.get("base_model_name_or_path")
                raise SourceError(
                    f"{self.folder} changes {name}, which the model does not have: the adapter belongs to another "
                    f"model (it says: {base})."
                )
            for step in steps:
                changed[name] = step(changed[name])
        return changed

    def _replaced(self, tensor: StoredTensor, dtype: np.dtype[np.generic], weight: Weight) -> Weight:
        if tensor.shape != weight.shape:
            raise SourceError(
                f"{self.folder}: {tensor.name} has shape {list(tensor.shape)}, but the model's has {list(weight.shape)}"
                ": the adapter belongs to another model (or to one whose vocabulary was resized)."
            )
        return plain_weight(tensor, dtype)


def _target(model: PreTrainedModel, module: str, update: LowRank) -> tuple[str, bool]:
    """The tensor that an update changes, and whether its module keeps it transposed."""
    try:
        found = model.get_submodule(module)
    except AttributeError:
        return f"{module}.weight", False
    if hasattr(found, "weight"):
        return f"{module}.weight", isinstance(found, Conv1D | torch.nn.Embedding)
    fitting = [name for name, value in found.named_parameters(recurse=False) if update.fits(tuple(value.shape))]
    if len(fitting) != 1:
        raise SourceError(f"{update.where} fits {len(fitting)} parameters of its module, where it must fit one.")
    return f"{module}.{fitting[0]}", bool(getattr(found, "is_transposed", False))


def by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, as PEFT decides it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default

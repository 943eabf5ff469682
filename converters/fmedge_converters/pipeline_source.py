"""The pipeline to export: a diffusers folder or a hub id, known by its model_index.json.

Finds the parts that the index names and their classes. A folder's own code is never run: parts must be classes of
diffusers or transformers, whatever the class of the pipeline.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from fmedge_runtimes.errors import SourceError
from fmedge_runtimes.manifest import MODEL_INDEX

from fmedge_converters.containers.safetensors import STEMS, VARIANTS
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.hub import SMALL_FILES, fetch
from fmedge_converters.large_tensors import LargeOnMeta
from fmedge_converters.source import licence_of

CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
HIDDEN = {"UnCLIPTextProjModel": "diffusers.pipelines.deprecated.unclip"}
"""Classes that lie deeper in diffusers than an index says; and where."""


@dataclass(frozen=True, slots=True)
class PartSource:
    """A part that the index names: a module, a scheduler, a tokenizer or an image processor."""

    name: str
    folder: Path
    kind: type[Any]
    """Its class."""

    @property
    def is_module(self) -> bool:
        """Whether it has weights."""
        return issubclass(self.kind, torch.nn.Module)

    @property
    def settings(self) -> dict[str, Any]:
        """Its configuration; empty for a part without one. Raises SourceError when it cannot be read."""
        path = next((self.folder / name for name in CONFIGS if (self.folder / name).is_file()), None)
        return {} if path is None else read_json(path)


@dataclass(frozen=True, slots=True)
class PipelineSource:
    """A pipeline that was found, and its parts."""

    id: str
    """The hub id, or the name of the local folder."""
    revision: str | None
    """The commit of the hub's repository; None for a local folder."""
    folder: Path
    pipeline: str
    """Its class."""
    index: Mapping[str, Any]
    parts: tuple[PartSource, ...]
    licence: str | None


COMBINED = {"KandinskyV22Pipeline": "KandinskyV22PriorPipeline"}
"""Pipelines that are the second stage of two, and the first; diffusers has a combined class for both."""
NOT_RUN = {
    "StableDiffusionLatentUpscalePipeline": "the runtime has no such pipeline; the upscaler that it has is "
    "StableDiffusionUpscalePipeline"
}
"""Pipelines whose parts could be exported, but not used; and why."""
LEFT_OUT = ("safety_checker", "watermarker")
"""Parts that are not exported: they judge or mark images that others have made."""
CONTROLNET, SEVERAL = "ControlNetModel", "MultiControlNetModel"
"""The classes of a ControlNet, and of several, which an index names as one part."""


def open_pipeline(
    source: str, revision: str | None = None, *, prior: str | None = None, allow_pickle: bool = False
) -> PipelineSource:
    """Find a pipeline and the classes of its parts; weights of a repository of the hub are fetched, those of the
    parts that are exported. `prior` is the folder or hub id of the first stage, where that is a pipeline of its own.

    Raises SourceError.
    """
    found = _open_one(source, revision, allow_pickle)
    if found.pipeline in NOT_RUN:
        raise SourceError(f"{source} is a {found.pipeline}: {NOT_RUN[found.pipeline]}.")
    if found.pipeline in COMBINED.values():
        raise SourceError(
            f"{source} ({found.pipeline}) makes embeddings, not images; export its decoder with --prior {source}."
        )
    if found.pipeline not in COMBINED:
        if prior is not None:
            raise SourceError(f"--prior means nothing to a {found.pipeline}; leave it out.")
        return found
    if prior is None:
        raise SourceError(
            f"{source} ({found.pipeline}) makes images of embeddings, not of text; give its first stage with --prior."
        )
    first = _open_one(prior, None, allow_pickle)
    wanted, combined = COMBINED[found.pipeline], found.pipeline.replace("Pipeline", "CombinedPipeline")
    if first.pipeline != wanted:
        raise SourceError(f"{prior} is a {first.pipeline}, and a {found.pipeline} needs a {wanted}.")
    parts = [*found.parts, *(replace(part, name=f"prior_{part.name}") for part in first.parts)]
    of_prior = {f"prior_{name}": value for name, value in first.index.items() if not name.startswith("_")}
    index = {**found.index, **of_prior, "_class_name": combined}
    return replace(found, pipeline=combined, index=index, parts=tuple(parts))


def _open_one(source: str, revision: str | None, allow_pickle: bool) -> PipelineSource:
    local = Path(source).expanduser()
    if local.is_dir() and revision is not None:
        raise SourceError(f"--revision is for hub ids; {source} is a local folder.")
    folder = local if local.is_dir() else fetch(source, revision, SMALL_FILES)
    index = read_json(folder / MODEL_INDEX)
    name = index.get("_class_name")
    # Of a folder with code of its own, [module, class].
    pipeline = name[1] if isinstance(name, list) and len(name) == 2 else name
    if not isinstance(pipeline, str):
        raise SourceError(f"{folder / MODEL_INDEX} names no _class_name; it is not a pipeline of diffusers.")
    parts = [
        part
        for key, value in sorted(index.items())
        if not key.startswith("_")
        for part in _parts(folder, key, value)
        if part is not None
    ]
    if not any(part.is_module for part in parts):
        raise SourceError(f"{folder / MODEL_INDEX} names no part with weights; it is not a pipeline of diffusers.")
    missing = _missing(pipeline, index, {part.name for part in parts})
    if missing is not None:
        raise SourceError(
            f"{folder / MODEL_INDEX} names no {missing}, which a {pipeline} needs; download or copy the folder again."
        )
    if local.is_dir():
        found_id, commit = folder.resolve().name, None
    else:
        found_id, commit = source, folder.name
        for part in parts:
            if part.is_module:
                fetch_weights(source, commit, part.folder, f"{part.folder.name}/", allow_pickle=allow_pickle)
    return PipelineSource(found_id, commit, folder, pipeline, index, tuple(parts), licence_of(folder, index))


def _missing(pipeline: str, index: Mapping[str, Any], found: AbstractSet[str]) -> str | None:
    """A part that the pipeline's class cannot do without and that was not found, if there is one."""
    with quiet_libraries():
        kind = getattr(diffusers, pipeline, None)
    if kind is None:
        return None
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        needed = parameter.default is inspect.Parameter.empty and name not in (*kind._optional_components, "self")
        # Prompts can be given as embeddings, and zeros stand in for a T5: the index says null then.
        nulled = name.startswith(("text_encoder", "tokenizer")) and isinstance(index.get(name), list)
        if needed and not nulled and name not in found and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            return name
    return None


def fetch_weights(source: str, commit: str, folder: Path, where: str, *, allow_pickle: bool) -> None:
    """Fetch the weights that lie in `where` in the repository, which is `folder` here."""
    # Without a variant if there is one: the rest of the repository is other precisions of the same numbers.
    for variant in VARIANTS:
        fetch(
            source,
            commit,
            [f"{where}{stem}{variant}{end}" for stem in STEMS for end in (".safetensors", "-*.safetensors")],
        )
        if any(folder.glob("*.safetensors")):
            return
    if allow_pickle:
        fetch(source, commit, [f"{where}*.bin"])


def _parts(folder: Path, name: str, value: object) -> list[PartSource | None]:
    """The parts that an entry of the index stands for: one, or several ControlNets in folders with numbers."""
    if not isinstance(value, list) or value[-1] != SEVERAL:
        return [_part(folder, name, value)]
    number = next(number for number in itertools.count(1) if not (folder / f"{name}_{number}").is_dir())
    names = [name, *(f"{name}_{other}" for other in range(1, number))]
    return [_part(folder, one, ["diffusers", CONTROLNET]) for one in names]


def _part(folder: Path, name: str, value: object) -> PartSource | None:
    """A part of the index; None for what is no part, is absent or is left out. Raises SourceError."""
    if not isinstance(value, list) or len(value) != 2 or value[1] is None or name in LEFT_OUT:
        return None
    library, class_name = value
    where = folder / name
    kind = _find_class(library, class_name)
    if kind is None:
        raise SourceError(
            f"{folder}: the part {name} is a {class_name} of {library}, and only parts of diffusers "
            f"{diffusers.__version__} and transformers {transformers.__version__} can be exported; code that a folder "
            "brings is never run."
        )
    if not where.is_dir():
        raise SourceError(f"{folder} has no folder {name}, which its {MODEL_INDEX} names; download or copy it again.")
    return PartSource(name, where, kind)


def _find_class(library: object, name: str) -> type[Any] | None:
    module: Any = {"diffusers": diffusers, "transformers": transformers}.get(str(library))
    if name in HIDDEN:
        module = importlib.import_module(HIDDEN[name])
    with quiet_libraries():
        try:
            found = getattr(module, name, None)
        except (ImportError, RuntimeError):  # classes that need packages which are not installed
            return None
    return found if isinstance(found, type) else None


def empty_part(part: PartSource) -> Any:  # noqa: ANN401 - any module
    """The module of a part, with parameters on the meta device and buffers in memory.

    Raises SourceError when its configuration is damaged, or its class cannot be built from it.
    """
    config = read_json(part.folder / CONFIGS[0])
    try:
        with quiet_libraries(), init_empty_weights(include_buffers=False), LargeOnMeta():
            if issubclass(part.kind, transformers.PreTrainedModel):
                settings = part.kind.config_class.from_pretrained(part.folder)
                module = part.kind._from_config(
                    settings, dtype=torch.float32, attn_implementation=_attention(part.kind)
                )
            else:
                module = part.kind.from_config(config)
    except Exception as error:  # each class has its own ways to refuse
        raise SourceError(
            f"{part.folder / CONFIGS[0]}: {part.kind.__name__} cannot be built from it: {error}"
        ) from error
    if isinstance(module, transformers.PreTrainedModel):
        # init_empty_weights makes a new parameter of every assignment, which unties those that were tied.
        module.tie_weights()
    return module.eval()


def _attention(kind: type[Any]) -> str:
    """The operator for attention, where a class of transformers can use it."""
    return "sdpa" if kind._supports_sdpa else "eager"


def loaded_part(part: PartSource, dtype: torch.dtype, *, allow_pickle: bool) -> Any:  # noqa: ANN401 - any module
    """The module of a part with its weights in memory, as diffusers and transformers load it."""
    options: dict[str, Any] = {"use_safetensors": None if allow_pickle else True}
    variant = next(
        (name for name in ("fp32", "bf16", "fp16") if list(part.folder.glob(f"*.{name}*safetensors*"))), None
    )
    plain = [path for path in part.folder.glob("*.safetensors") if path.stem in ("model", "diffusion_pytorch_model")]
    if variant is not None and not plain:
        options["variant"] = variant
    if issubclass(part.kind, transformers.PreTrainedModel):
        options |= {"dtype": dtype, "attn_implementation": _attention(part.kind)}
    else:
        options |= {"torch_dtype": dtype}
    with quiet_libraries():
        return part.kind.from_pretrained(part.folder, **options).eval()


def read_json(path: Path) -> dict[str, Any]:
    """A table of settings. Raises SourceError when there is none."""
    if not path.is_file():
        raise SourceError(f"{path} is missing; download or copy the folder again.")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise SourceError(f"{path} is not JSON ({error}); copy it again.") from error
    if not isinstance(raw, dict):
        raise SourceError(f"{path} is no table of settings; copy it again.")
    return raw

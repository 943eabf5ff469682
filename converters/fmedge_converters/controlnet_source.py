"""ControlNets that are added to a pipeline: folders of diffusers, or hub ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
from fmedge_runtimes.errors import SourceError

from fmedge_converters.hub import SMALL_FILES, fetch
from fmedge_converters.parts.controlnets import check_controlnet
from fmedge_converters.pipeline_source import CONTROLNET, SEVERAL, PartSource, PipelineSource, fetch_weights, read_json

PART = "controlnet"
CONTROLLED: Mapping[str, str] = {
    "StableDiffusionPipeline": "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLControlNetInpaintPipeline",
}
"""Pipelines that take ControlNets, and what diffusers calls them then."""


def with_controlnets(source: PipelineSource, added: Sequence[str], *, allow_pickle: bool = False) -> PipelineSource:
    """The pipeline with more ControlNets, behind those that it has. Raises SourceError."""
    if not added:
        return source
    known = set(CONTROLLED.values())
    if source.pipeline not in CONTROLLED and source.pipeline not in known:
        raise SourceError(
            f"--controlnet means nothing to a {source.pipeline}; it is for {', '.join(sorted(CONTROLLED))}."
        )
    first = sum(part.name.split("_")[0] == PART for part in source.parts)
    folders = [_folder(one, allow_pickle=allow_pickle) for one in added]
    parts = [
        PartSource(f"{PART}_{number}" if number else PART, folder, diffusers.ControlNetModel)
        for number, folder in enumerate(folders, first)
    ]
    pipeline = CONTROLLED.get(source.pipeline, source.pipeline)
    kind = SEVERAL if first + len(parts) > 1 else CONTROLNET
    index = {**source.index, "_class_name": pipeline, PART: ["diffusers", kind]}
    return replace(source, pipeline=pipeline, index=index, parts=(*source.parts, *parts))


def is_controlnet(part: PartSource) -> bool:
    """Whether a part is a ControlNet."""
    return part.kind.__name__ == CONTROLNET


def check_controlnets(source: PipelineSource, modules: Mapping[str, Any]) -> None:
    """Raise SourceError if a ControlNet was made for another model than this pipeline's."""
    for part in source.parts:
        if is_controlnet(part):
            check_controlnet(modules[part.name], modules["unet"], modules["vae"], str(part.folder))


def _folder(source: str, *, allow_pickle: bool) -> Path:
    """The folder of a ControlNet, from the hub if need be."""
    local = Path(source).expanduser()
    if local.is_file():
        raise SourceError(f"{source} is a file; give a ControlNet as the folder that diffusers writes, or a hub id.")
    folder = local if local.is_dir() else fetch(source, None, SMALL_FILES)
    name = read_json(folder / "config.json").get("_class_name")
    if name != CONTROLNET:
        raise SourceError(
            f"{source} is a {name or 'model of no class'}; --controlnet takes a {CONTROLNET} of diffusers. "
            "T2I-Adapters, ControlNet-XS, unions and ControlNets of other families are not supported."
        )
    if not local.is_dir():
        fetch_weights(source, folder.name, folder, "", allow_pickle=allow_pickle)
    return folder

"""Where an IP-Adapter lies, with its image encoder and what prepares images for it: a folder, a file or a hub id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import transformers
from fmedge_runtimes.errors import SourceError

from fmedge_converters.hub import SMALL_FILES, fetch
from fmedge_converters.ip_adapter import ENCODER
from fmedge_converters.pipeline_source import PartSource, PipelineSource, fetch_weights

PROCESSOR = "feature_extractor"
ADAPTED = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
)
"""Pipelines that take an IP-Adapter; with ControlNets, too."""
PATTERNS = ("*.safetensors", "*.bin")


def with_image_encoder(source: PipelineSource, given: str, *, allow_pickle: bool) -> tuple[PipelineSource, Path]:
    """The pipeline with the image encoder of an IP-Adapter, unless it has one; and the adapter's file.

    Raises SourceError.
    """
    if source.pipeline.replace("ControlNet", "") not in ADAPTED:
        raise SourceError(f"--ip-adapter means nothing to a {source.pipeline}; it is for {', '.join(sorted(ADAPTED))}.")
    path = Path(given).expanduser()
    file = _only_file(path) if path.exists() else _fetched(given, allow_pickle=allow_pickle)
    parts = source.parts
    if not any(part.name == ENCODER for part in parts):
        folder = file.parent / ENCODER
        if not (folder / "config.json").is_file():
            raise SourceError(
                f"{file.parent} has no folder {ENCODER}, and the pipeline has none either; put the image encoder of "
                "the IP-Adapter there."
            )
        parts = (*parts, PartSource(ENCODER, folder, transformers.CLIPVisionModelWithProjection))
    index = {**source.index, ENCODER: ["transformers", "CLIPVisionModelWithProjection"]}
    return replace(source, index=index, parts=parts), file


def write_processor(source: PipelineSource, output: Path) -> None:
    """Write how images become the encoder's pixels, as diffusers takes it where the pipeline does not say."""
    if any(part.name == PROCESSOR for part in source.parts):
        return
    (encoder,) = (part for part in source.parts if part.name == ENCODER)
    size = encoder.settings.get("image_size", 224)
    settings = transformers.CLIPImageProcessor(size=size, crop_size=size).to_dict()
    (output / PROCESSOR).mkdir()
    (output / PROCESSOR / "preprocessor_config.json").write_text(
        json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n", "utf-8"
    )


def _only_file(path: Path) -> Path:
    if path.is_file():
        return path
    files: Sequence[Path] = sorted(file for pattern in PATTERNS for file in path.glob(pattern))
    if not files:
        raise SourceError(f"{path} is no IP-Adapter: there is no .safetensors or .bin file.")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise SourceError(f"{path} holds {len(files)} IP-Adapters; give the file of one ({names}).")
    return files[0]


def _fetched(given: str, *, allow_pickle: bool) -> Path:
    """A file of a repository of the hub: owner/name/path/to/file."""
    pieces = given.split("/")
    if len(pieces) < 3 or not pieces[-1].endswith((".safetensors", ".bin")):
        raise SourceError(
            f"{given} is no file or folder that exists; of a repository of the hub, give the file: "
            "owner/name/models/ip-adapter_sd15.safetensors."
        )
    repository, name = "/".join(pieces[:2]), "/".join(pieces[2:])
    folder = fetch(repository, None, [name, *SMALL_FILES])
    file = folder / name
    if not file.is_file():
        raise SourceError(f"{repository} has no file {name}.")
    where = (file.parent / ENCODER).relative_to(folder).as_posix()
    fetch_weights(repository, folder.name, file.parent / ENCODER, f"{where}/", allow_pickle=allow_pickle)
    return file

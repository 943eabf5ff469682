"""`fmedge export`: a decoder or an image pipeline to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from fmedge_converters.export_options import Cache, ExportOptions, Verify

EPILOG = """
[bold]Examples[/bold]

  fmedge export out/model out/bundle --quantize int4

  fmedge export owner/name out/bundle --revision main --context 4096

  fmedge export out/model out/bundle --quantize int4 --cache int8

  fmedge export out/model out/bundle --adapter ./lora

  fmedge export out/model out/bundle --quantize int4 --layout genai

  fmedge export ./stable-diffusion out/images --quantize int8 --adapter ./style.safetensors

  fmedge export ./kandinsky-decoder out/images --prior ./kandinsky-prior

  fmedge export ./model.Q4_0.gguf out/bundle --quantize int4

  fmedge export ./checkpoint out/gpu --target cuda --quantize int4 --verify graph

  fmedge export ./checkpoint out/jetson --target orin-nano-8gb --quantize int4 --context 2048
"""


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of transformers or diffusers, hub id, .gguf file, folder of `fmedge train`, or a LoRA."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = ExportOptions.revision,
    target: Annotated[
        str,
        typer.Option(
            help="cpu, cuda, tensorrt, tensorrt-compat, rtx, or a device such as orin-nano-8gb (docs/targets.md)."
        ),
    ] = ExportOptions.target,
    quantize: Annotated[
        str, typer.Option(help="none, int8 or int4; for images on the CPU fp16 and bf16, too.")
    ] = ExportOptions.quantize,
    block_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale (16 to 256), for int4 and for int8 on CUDA.")
    ] = ExportOptions.block_size,
    context: Annotated[
        int | None, typer.Option(help="Tokens that a row can hold; unless given the model's maximum, up to 32768.")
    ] = ExportOptions.context,
    cache: Annotated[
        Cache,
        typer.Option(help="How keys and values are kept: float, or int8 in a quarter of the memory (target cpu)."),
    ] = ExportOptions.cache,
    verify: Annotated[
        Verify,
        typer.Option(help="full: compare the real weights with PyTorch. graph: the architecture only. none: trust it."),
    ] = ExportOptions.verify,
    text: Annotated[
        Path | None,
        typer.Option(help="Text for comparisons and the scales of --cache; Python's own documentation unless given."),
    ] = ExportOptions.text,
    prior: Annotated[
        str | None, typer.Option(help="First stage of an image pipeline in two (Kandinsky 2.2): folder or hub id.")
    ] = ExportOptions.prior,
    adapter: Annotated[
        str | None, typer.Option(help="LoRA to merge into the weights: a folder, a hub id, or for images a file.")
    ] = ExportOptions.adapter,
    adapter_scale: Annotated[
        float, typer.Option(help="How much of an image pipeline's LoRA is added.")
    ] = ExportOptions.adapter_scale,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read pytorch_model.bin, with PyTorch's weights-only loader."),
    ] = ExportOptions.allow_pickle,
    layout: Annotated[
        str | None,
        typer.Option(help="Another runtime that is to load the bundle, too: genai (onnxruntime-genai)."),
    ] = ExportOptions.layout,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a bundle; write one that fails its verification.")
    ] = ExportOptions.force,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as one JSON line.")] = False,
) -> None:
    """Export a decoder, or a pipeline that makes images, with the proof that it computes what its source computes."""
    from fmedge.commands.console import progress_bar
    from fmedge.commands.inspect import show
    from fmedge.extras import require_export

    require_export()
    from fmedge_converters.export import export

    options = ExportOptions(
        source=source,
        output=output,
        revision=revision,
        target=target,
        quantize=quantize,
        block_size=block_size,
        context=context,
        cache=cache,
        verify=verify,
        text=text,
        prior=prior,
        adapter=adapter,
        adapter_scale=adapter_scale,
        allow_pickle=allow_pickle,
        layout=layout,
        force=force,
    )
    with progress_bar() as progress:
        bundle = export(options, progress)
    show(bundle, as_json=as_json)

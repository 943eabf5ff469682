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

  fmedge export out/model out/bundle --quantize int4-gptq --bits 4.75

  fmedge export out/model out/bundle --quantize int4-gptq --calibrate texts/ --calibrate-tokens 32768

  fmedge export out/model out/bundle --quantize int4 --cache int8

  fmedge export out/model out/bundle --quantize int4 --prefill w8a8

  fmedge export out/model out/bundle --adapter ./lora

  fmedge export out/model out/bundle --quantize int4 --layout genai

  fmedge export ./stable-diffusion out/images --quantize int8 --adapter ./style.safetensors

  fmedge export ./stable-diffusion out/images --quantize auto

  fmedge export ./stable-diffusion out/images --controlnet ./canny

  fmedge export ./stable-diffusion out/images --ip-adapter ./models/ip-adapter_sd15.safetensors

  fmedge export ./stable-diffusion out/images --adapter ./style.safetensors --keep-adapter

  fmedge export ./kandinsky-decoder out/images --prior ./kandinsky-prior

  fmedge export ./model.Q4_0.gguf out/bundle --quantize int4

  fmedge export ./checkpoint out/gpu --target cuda --quantize int4 --verify graph

  fmedge export ./checkpoint out/jetson --target orin-nano-8gb --quantize int4 --context 2048
"""


WEIGHTS = "How weights and cache are kept"
CALIBRATION = "What weights are fitted to"
IMAGES = "Only for pipelines that make images"


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
        str,
        typer.Option(
            help="none, int8, int4, int4-awq, int4-gptq or w8a8; on the CPU fp16 and bf16, too; for TensorRT fp8, too, "
            "where the GPU has it; for images none, int8, int4, with TensorRT fp8, and on the CPU fp16, bf16 and auto "
            "(the fastest that holds).",
            rich_help_panel=WEIGHTS,
        ),
    ] = ExportOptions.quantize,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale (16 to 256; 32 unless given, for TensorRT 128), for int4, int4-awq, "
            "int4-gptq, and for int8 on the CPU and CUDA.",
            rich_help_panel=WEIGHTS,
        ),
    ] = ExportOptions.block_size,
    asymmetric: Annotated[
        bool,
        typer.Option(
            "--asymmetric",
            help="Give each block a zero point of its own, for int4, int4-awq and int4-gptq.",
            rich_help_panel=WEIGHTS,
        ),
    ] = ExportOptions.asymmetric,
    head_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of the head and the token embedding, for int4, int4-awq and int4-gptq: 8 unless given, or 4.",
            rich_help_panel=WEIGHTS,
        ),
    ] = ExportOptions.head_bits,
    bits: Annotated[
        float | None,
        typer.Option(
            help="For int4, int4-awq and int4-gptq: a size in bits per weight, scales included; what each matrix gets "
            "is chosen by measuring what it does to the output.",
            rich_help_panel=WEIGHTS,
        ),
    ] = ExportOptions.bits,
    prefill: Annotated[
        str | None,
        typer.Option(
            help="Beside int4 or int8 on the CPU: a second graph, for prompts, that reads them faster (w8a8).",
            rich_help_panel=WEIGHTS,
        ),
    ] = ExportOptions.prefill,
    context: Annotated[
        int | None, typer.Option(help="Tokens that a row can hold; unless given the model's maximum, up to 32768.")
    ] = ExportOptions.context,
    cache: Annotated[
        Cache,
        typer.Option(
            help="How keys and values are kept: float, or int8 in a quarter of the memory (target cpu).",
            rich_help_panel=WEIGHTS,
        ),
    ] = ExportOptions.cache,
    verify: Annotated[
        Verify,
        typer.Option(help="full: compare the real weights with PyTorch. graph: the architecture only. none: trust it."),
    ] = ExportOptions.verify,
    calibrate: Annotated[
        list[str],
        typer.Option(
            help="Text that weights are fitted to: a text file, a .jsonl file of text or messages, or a folder of "
            "both; repeatable. int4-awq, int4-gptq, w8a8 and fp8 take Python's own documentation without it. For "
            "images in fp8: a file of prompts, one on each line.",
            show_default=False,
            rich_help_panel=CALIBRATION,
        ),
    ] = list(ExportOptions.calibrate),  # noqa: B006 - typer copies it
    calibrate_tokens: Annotated[
        int, typer.Option(help="Tokens of that text that are used.", rich_help_panel=CALIBRATION)
    ] = ExportOptions.calibrate_tokens,
    calibrate_chat: Annotated[
        bool,
        typer.Option(
            "--calibrate-chat",
            help="Put messages of .jsonl files through the chat template.",
            rich_help_panel=CALIBRATION,
        ),
    ] = ExportOptions.calibrate_chat,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="File of what is measured on that text: written, or read if it is there (.safetensors).",
            rich_help_panel=CALIBRATION,
        ),
    ] = ExportOptions.statistics,
    text: Annotated[
        Path | None,
        typer.Option(help="Text for comparisons and the scales of --cache; Python's own documentation unless given."),
    ] = ExportOptions.text,
    prior: Annotated[
        str | None,
        typer.Option(
            help="First stage of an image pipeline in two (Kandinsky 2.2): folder or hub id.", rich_help_panel=IMAGES
        ),
    ] = ExportOptions.prior,
    controlnet: Annotated[
        list[str] | None,
        typer.Option(
            help="ControlNet to add to Stable Diffusion (XL): folder or hub id; may be repeated.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    ip_adapter: Annotated[
        str | None,
        typer.Option(
            help="IP-Adapter to add to Stable Diffusion (XL): its file or folder, image_encoder beside it.",
            rich_help_panel=IMAGES,
        ),
    ] = ExportOptions.ip_adapter,
    adapter: Annotated[
        str | None, typer.Option(help="LoRA to merge into the weights: a folder, a hub id, or for images a file.")
    ] = ExportOptions.adapter,
    adapter_scale: Annotated[
        float, typer.Option(help="How much of an image pipeline's LoRA is added.", rich_help_panel=IMAGES)
    ] = ExportOptions.adapter_scale,
    keep_adapter: Annotated[
        bool,
        typer.Option(
            "--keep-adapter",
            help="Do not merge an image pipeline's LoRA: generate --adapter-scale scales it.",
            rich_help_panel=IMAGES,
        ),
    ] = ExportOptions.keep_adapter,
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
        asymmetric=asymmetric,
        head_bits=head_bits,
        bits=bits,
        prefill=prefill,
        context=context,
        cache=cache,
        verify=verify,
        calibrate=tuple(calibrate),
        calibrate_tokens=calibrate_tokens,
        calibrate_chat=calibrate_chat,
        statistics=statistics,
        text=text,
        prior=prior,
        controlnets=tuple(controlnet or ()),
        ip_adapter=ip_adapter,
        adapter=adapter,
        adapter_scale=adapter_scale,
        keep_adapter=keep_adapter,
        allow_pickle=allow_pickle,
        layout=layout,
        force=force,
    )
    with progress_bar() as progress:
        bundle = export(options, progress)
    show(bundle, as_json=as_json)

"""`fmedge generate`: texts or images from prompts, as the bundle makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.sampling import checked

from fmedge.commands.byte_size import parse_bytes
from fmedge.commands.device_options import DEVICE_HELP, GRAPHS_HELP, PrefillOption
from fmedge.commands.image_options import (
    IMAGE_OPTIONS,
    AdapterScale,
    ClipSkip,
    Control,
    ControlEnd,
    ControlScale,
    ControlStart,
    Grid,
    GuessMode,
    Guidance,
    GuidanceRescale,
    IpAdapterImage,
    IpAdapterScale,
    LiteralPrompts,
    Mask,
    MaxSequenceLength,
    MemoryMode,
    Negative,
    NoiseLevel,
    Preview,
    PreviewEvery,
    Scheduler,
    Size,
    StartImage,
    Steps,
    Strength,
    Tiling,
    TinyVae,
)
from fmedge.commands.kinds import parse_size, refuse_others
from fmedge.commands.sampling_options import (
    Ban,
    BestOf,
    ForceToken,
    FrequencyPenalty,
    Grammar,
    HowMany,
    IgnoreEos,
    JsonObject,
    JsonSchema,
    LengthPenalty,
    LogitBias,
    Logprobs,
    MaxNewTokens,
    MinNewTokens,
    MinP,
    PresencePenalty,
    Regex,
    RepetitionPenalty,
    Seed,
    Stop,
    StopToken,
    Temperature,
    TopK,
    TopP,
    TypicalP,
)

EPILOG = """
[bold]Examples[/bold]

  fmedge generate out/bundle "The list type"

  fmedge generate out/bundle "Once" "Twice" --temperature 0.8 --n 2 --seed 1

  fmedge generate out/bundle --chat "What is a tuple?"

  fmedge generate out/bundle --input prompts.jsonl --output completions.jsonl

  fmedge generate out/bundle --input big.jsonl --output done.jsonl --resume

  cat prompts.txt | fmedge generate out/bundle --input - --json

  fmedge generate out/bundle "A person:" --json-schema person.schema.json

  fmedge generate out/bundle "The year:" --regex "[0-9]{4}"

  fmedge generate out/bundle "Once" --temperature 1 --best-of 8

  fmedge generate out/bundle "Yes or no?" --max-new-tokens 1 --logprobs 5 --json --ban 17 --logit-bias 42=-1.5

  fmedge generate out/images "a red circle" "a blue square" -n 4 --seed 7 --output made --grid grid.png

  fmedge generate out/images "a house" --control edges.png --control-scale 0.8 --output house.png

  fmedge generate out/images "a (red:1.3) circle" --image in.png --strength 0.6 --scheduler dpm++2m-karras -o out.png

  fmedge generate out/images "a red circle" --steps 50 --preview-every 5 -o made
"""

T = TypeVar("T")
BOTH_OPTIONS = frozenset(
    {
        "bundle",
        "prompts",
        "source",
        "output",
        "force",
        "seed",
        "n",
        "device",
        "max_batch",
        "threads",
        "memory",
        "as_json",
    }
)
"""Parameters that every bundle takes; all others are for bundles that write text."""


def command(
    ctx: typer.Context,
    bundle: Annotated[
        Path, typer.Argument(help="Folder of the bundle, or of a decoder that optimum or onnxruntime-genai exported.")
    ],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; all are served together.")] = None,
    source: Annotated[
        str | None,
        typer.Option("--input", "-i", help="File with prompts: one on each line, or .jsonl; - is stdin."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="Write completions to a .jsonl file, images to a .png file or a folder; - is stdout."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a job from --input to --output where it was interrupted.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output of an earlier job, or images.")] = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    typical_p: TypicalP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    n: HowMany = None,
    best_of: BestOf = None,
    length_penalty: LengthPenalty = None,
    logit_bias: LogitBias = None,
    ban: Ban = None,
    force_token: ForceToken = None,
    logprobs: Logprobs = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: MinNewTokens = None,
    stop: Stop = None,
    stop_token: StopToken = None,
    ignore_eos: IgnoreEos = False,
    json_object: JsonObject = False,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are a user's messages in a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="System message for --chat.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    size: Size = None,
    scheduler: Scheduler = None,
    image: StartImage = None,
    strength: Strength = None,
    mask: Mask = None,
    control: Control = None,
    control_scale: ControlScale = None,
    control_start: ControlStart = None,
    control_end: ControlEnd = None,
    guess_mode: GuessMode = False,
    adapter_scale: AdapterScale = None,
    ip_adapter_image: IpAdapterImage = None,
    ip_adapter_scale: IpAdapterScale = None,
    guidance_rescale: GuidanceRescale = None,
    clip_skip: ClipSkip = None,
    literal: LiteralPrompts = False,
    max_sequence_length: MaxSequenceLength = None,
    tiling: Tiling = None,
    tiny_vae: TinyVae = False,
    noise_level: NoiseLevel = None,
    memory_mode: MemoryMode = None,
    grid: Grid = None,
    preview_every: PreviewEvery = None,
    preview: Preview = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Rows that are decoded, or images that are denoised, together at most.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU; all cores unless given.")] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="What all of it may take (6GiB): weights, working memory, cache; what is free, if not given.",
        ),
    ] = None,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help=GRAPHS_HELP)] = True,
    prefill_graph: PrefillOption = "prompts",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line for each completion.")] = False,
) -> None:
    """Complete prompts, or make images of them. Options that are not given are the bundle's own.

    From a file to a file, prompts are read as rows get free, and results are written as they finish, with the "id" of
    their line or its number: of any size, and --resume continues after an interruption.

    Exits with 1 if a prompt could not be served; the others are completed all the same.
    """
    from fmedge_runtimes.load import kind_of

    from fmedge.commands.call import Call

    call = Call(
        bundle,
        tuple(prompts or ()),
        source,
        output,
        force,
        as_json,
        device,
        max_batch,
        threads,
        memory,
        cuda_graphs,
        prefill_graph,
    )
    makes_images = kind_of(bundle) == "image"
    texts = {str(parameter.name) for parameter in ctx.command.params} - IMAGE_OPTIONS - BOTH_OPTIONS
    refuse_others(ctx, bundle, makes_images=makes_images, others=texts if makes_images else IMAGE_OPTIONS)
    if makes_images:
        from fmedge.commands.images import generate_images

        wanted: dict[str, Any] = {
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "negative": negative,
            "width": None if size is None else parse_size(size)[0],
            "height": None if size is None else parse_size(size)[1],
            "n": n,
            "scheduler": scheduler,
            "image": image,
            "strength": strength,
            "mask": mask,
            "control": _one_or_each(control),
            "control_scale": _one_or_each(control_scale),
            "control_start": _one_or_each(control_start),
            "control_end": _one_or_each(control_end),
            "guess_mode": guess_mode or None,
            "adapter_scale": adapter_scale,
            "ip_adapter_image": _one_or_each(ip_adapter_image),
            "ip_adapter_scale": ip_adapter_scale,
            "guidance_rescale": guidance_rescale,
            "clip_skip": clip_skip,
            "weights": False if literal else None,
            "max_sequence_length": max_sequence_length,
            "tiling": tiling,
            "tiny_vae": tiny_vae or None,
            "noise_level": noise_level,
            "preview_every": preview_every,
        }
        options = Diffusion(**_given(wanted))
        generate_images(call, options, grid=grid, preview=preview, memory_mode=memory_mode)
        return
    from fmedge.commands.texts import generate_texts

    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "n": n,
        "best_of": best_of,
        "length_penalty": length_penalty,
        "logit_bias": dict(map(_bias, logit_bias)) if logit_bias else None,
        "banned_tokens": ban or None,
        "forced_tokens": force_token or None,
        "logprobs": logprobs,
        "min_new_tokens": min_new_tokens,
        "stop": stop or None,
        "stop_token_ids": stop_token or None,
        "ignore_eos": ignore_eos or None,
        "json": json_object or None,
        "json_schema": json_schema if json_schema is None or json_schema.lstrip()[:1] == "{" else _read(json_schema),
        "regex": regex,
        "grammar": None if grammar is None else _read(grammar),
    }
    # What can be refused without the model is refused before it is loaded.
    generate_texts(call, checked(_given(given)), resume=resume, chat=chat, system=system)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _one_or_each(values: list[T] | None) -> T | tuple[T, ...] | None:
    """What an option says that may be repeated; None if it was not given."""
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def _bias(text: str) -> tuple[str, float]:
    token, _, bias = text.partition("=")
    try:
        return token, float(bias)
    except ValueError as error:
        raise typer.BadParameter(f"--logit-bias is {text!r}; it must be ID=BIAS, like 42=-1.5.") from error


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}).") from error

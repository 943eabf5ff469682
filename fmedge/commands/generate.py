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
from fmedge.commands.kinds import parse_size, refuse_others

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
SHAPES = "How draws are shaped"
TOKENS = "Which tokens"
ENDS = "Where completions end"
FORMS = "What the text must follow: one of these (needs pip install 'fmedge\\[constraints]')"
IMAGES = "For bundles that make images"
IMAGE_OPTIONS = frozenset(
    {
        "steps",
        "guidance",
        "negative",
        "size",
        "scheduler",
        "image",
        "strength",
        "mask",
        "control",
        "control_scale",
        "control_start",
        "control_end",
        "guess_mode",
        "adapter_scale",
        "ip_adapter_image",
        "ip_adapter_scale",
        "guidance_rescale",
        "clip_skip",
        "literal",
        "max_sequence_length",
        "tiling",
        "tiny_vae",
        "noise_level",
        "memory_mode",
        "grid",
        "preview_every",
        "preview",
    }
)
"""Parameters of the command that only such bundles take."""
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
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; above 0 draws.", rich_help_panel=SHAPES)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k likeliest tokens; 0 is off.", rich_help_panel=SHAPES)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest tokens that sum to p; 1 is off.", rich_help_panel=SHAPES),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from tokens at least this times as likely as the likeliest; 0 is off.", rich_help_panel=SHAPES
        ),
    ] = None,
    typical_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from tokens as surprising as expected, that sum to p; 1 is off.", rich_help_panel=SHAPES
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 discourages repetition.", rich_help_panel=SHAPES)
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Subtracted from logits of tokens seen.", rich_help_panel=SHAPES)
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="The same, for each time seen.", rich_help_panel=SHAPES)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes draws reproducible.", rich_help_panel=SHAPES)] = None,
    n: Annotated[
        int | None, typer.Option("--n", "-n", help="Completions, or images, for each prompt.", rich_help_panel=SHAPES)
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(help="Generate so many, give the --n of highest log-probability.", rich_help_panel=SHAPES),
    ] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option(
            help="With --best-of: 1 compares the mean of the tokens' log-probabilities, 0 their sum.",
            rich_help_panel=SHAPES,
        ),
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=BIAS", help="Add to the logit of a token; may be repeated.", rich_help_panel=TOKENS),
    ] = None,
    ban: Annotated[
        list[int] | None,
        typer.Option(metavar="ID", help="Token that never comes; may be repeated.", rich_help_panel=TOKENS),
    ] = None,
    force_token: Annotated[
        list[int] | None,
        typer.Option(metavar="ID", help="Token that completions begin with; may be repeated.", rich_help_panel=TOKENS),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With JSON output: log-probabilities of each token and of so many likeliest ones.",
            rich_help_panel=TOKENS,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate at most.", rich_help_panel=ENDS)
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(help="No end-of-sequence or stop token before so many.", rich_help_panel=ENDS)
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="String that ends a completion; may be repeated.", rich_help_panel=ENDS),
    ] = None,
    stop_token: Annotated[
        list[int] | None,
        typer.Option(metavar="ID", help="Token that ends a completion; may be repeated.", rich_help_panel=ENDS),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past end-of-sequence tokens.", rich_help_panel=ENDS)
    ] = False,
    json_object: Annotated[
        bool, typer.Option("--json-object", help="The text is a JSON object.", rich_help_panel=FORMS)
    ] = False,
    json_schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="The text is JSON of this JSON Schema: a file, or {...} itself.", rich_help_panel=FORMS
        ),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="The text matches this regular expression as a whole.", rich_help_panel=FORMS)
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The text follows this grammar, Lark or GBNF.", rich_help_panel=FORMS),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are a user's messages in a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="System message for --chat.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps from noise to image.", rich_help_panel=IMAGES)] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How strongly the prompt pulls; up to 1 is off, and faster.", rich_help_panel=IMAGES),
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What the images should not show.", rich_help_panel=IMAGES)
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", help="In pixels.", rich_help_panel=IMAGES)] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="How noise is taken away: euler, dpm++2m-karras, ...", rich_help_panel=IMAGES),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start from this image.", rich_help_panel=IMAGES)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="With --image: near 0 it stays, at 1 nothing is left of it.", rich_help_panel=IMAGES),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --image: repaint only where this is white.", rich_help_panel=IMAGES),
    ] = None,
    control: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Image for the ControlNet: one for all prompts, or repeated for each; of a bundle with several "
            "ControlNets one for each of them.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    control_scale: Annotated[
        list[float] | None,
        typer.Option(help="How strongly ControlNets pull; may be repeated for each.", rich_help_panel=IMAGES),
    ] = None,
    control_start: Annotated[
        list[float] | None,
        typer.Option(help="Share of the steps behind which a ControlNet begins.", rich_help_panel=IMAGES),
    ] = None,
    control_end: Annotated[
        list[float] | None,
        typer.Option(help="Share of the steps behind which a ControlNet rests.", rich_help_panel=IMAGES),
    ] = None,
    guess_mode: Annotated[
        bool,
        typer.Option(
            "--guess-mode", help="The ControlNet's image speaks even without a prompt.", rich_help_panel=IMAGES
        ),
    ] = False,
    adapter_scale: Annotated[
        float | None,
        typer.Option(help="How much of a LoRA is added, of a bundle that keeps one apart.", rich_help_panel=IMAGES),
    ] = None,
    ip_adapter_image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Image for the IP-Adapter: one for all prompts, or repeated for each.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    ip_adapter_scale: Annotated[
        float | None, typer.Option(help="How strongly that image pulls.", rich_help_panel=IMAGES)
    ] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(help="Contrast brought back, from 0 (off) to 1.", rich_help_panel=IMAGES)
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option(help="Last layers of the text encoder to leave out.", rich_help_panel=IMAGES)
    ] = None,
    literal: Annotated[
        bool, typer.Option("--literal", help="Brackets in prompts are no weights.", rich_help_panel=IMAGES)
    ] = False,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens that a T5 or Gemma text encoder's prompt may have.", rich_help_panel=IMAGES),
    ] = None,
    tiling: Annotated[
        bool | None,
        typer.Option("--tiling/--no-tiling", help="Decode in tiles; large images only.", rich_help_panel=IMAGES),
    ] = None,
    tiny_vae: Annotated[
        bool, typer.Option("--tiny-vae", help="Decode with the bundle's small autoencoder.", rich_help_panel=IMAGES)
    ] = False,
    noise_level: Annotated[
        int | None,
        typer.Option(help="Of upscalers: noise on the small image; more invents more.", rich_help_panel=IMAGES),
    ] = None,
    memory_mode: Annotated[
        str | None,
        typer.Option(help="keep: all parts stay loaded; sequential: one at a time.", rich_help_panel=IMAGES),
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all images side by side to a .png, too.", rich_help_panel=IMAGES),
    ] = None,
    preview_every: Annotated[
        int | None,
        typer.Option(metavar="STEPS", help="Write a small preview every so many steps.", rich_help_panel=IMAGES),
    ] = None,
    preview: Annotated[
        Path | None,
        typer.Option(
            metavar="PLACE",
            help="Folder for previews, or a .png file that shows the newest; unless given, beside --output.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
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

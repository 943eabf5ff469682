"""`fmedge generate`: complete prompts with a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.sampling import Sampling

if TYPE_CHECKING:
    from fmedge_runtimes.text import Prompt, TextModel

    from fmedge.commands.prompts import PromptLine

EPILOG = """
[bold]Examples[/bold]

  fmedge generate out/bundle "The list type"

  fmedge generate out/bundle "Once" "Twice" --temperature 0.8 --n 2 --seed 1

  fmedge generate out/bundle --chat "What is a tuple?"

  fmedge generate out/bundle --input prompts.jsonl --output completions.jsonl

  cat prompts.txt | fmedge generate out/bundle --input - --json
"""


def command(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; all are served in one batch.")] = None,
    source: Annotated[
        str | None,
        typer.Option("--input", "-i", help="File with prompts: one on each line, or .jsonl; - is stdin."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Write completions to a .jsonl file; - is stdout.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; above 0 draws.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that sum to p; 1 is off.")] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Draw from tokens at least this times as likely as the likeliest; 0 is off."),
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Subtracted from logits of tokens seen.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, for each time seen.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes draws reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends a completion; may be repeated.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Completions for each prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are a user's messages in a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="System message for --chat.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the bundle's target unless given.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Rows that are decoded together at most.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU; all cores unless given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line for each completion.")] = False,
) -> None:
    """Complete prompts, all in one batch. Options that are not given are the bundle's own.

    Exits with 1 if a prompt could not be served; the others are completed all the same.
    """
    from fmedge_runtimes.engine import DEFAULTS
    from fmedge_runtimes.load import load

    from fmedge.commands.completions import write_completions
    from fmedge.commands.prompts import read_prompts

    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat.")
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
        "n": n,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    # What can be refused without the model is refused before it is loaded.
    replace(Sampling(), **changes)
    lines = read_prompts(prompts or [], source)
    with load(
        bundle, device=device, max_batch=DEFAULTS.max_batch if max_batch is None else max_batch, threads=threads
    ) as model:
        base = replace(model.default_sampling, **changes)
        requests = [_prompt(model, line, chat=chat, system=system) for line in lines]
        deltas = model.stream(requests, [replace(base, **line.overrides) for line in lines])
        failed = write_completions(deltas, requests, output=output, as_json=as_json)
    if failed:
        raise typer.Exit(1)


def _prompt(model: TextModel, line: PromptLine, *, chat: bool, system: str | None) -> Prompt:
    if line.messages is not None and system is not None:
        raise RequestError('--system is for prompts; put a system message among the "messages" of the file.')
    if line.messages is not None:
        return model.chat_prompt(line.messages)
    if not chat:
        return line.prompt if line.prompt is not None else ""
    if not isinstance(line.prompt, str):
        raise RequestError("--chat takes texts, not token ids.")
    before = [] if system is None else [{"role": "system", "content": system}]
    return model.chat_prompt([*before, {"role": "user", "content": line.prompt}])

"""`fmedge generate`: complete prompts with a bundle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.sampling import checked

from fmedge.commands.byte_size import parse_bytes

if TYPE_CHECKING:
    from fmedge_runtimes.completion import Delta
    from fmedge_runtimes.sampling import Sampling
    from fmedge_runtimes.text import Prompt, TextModel

    from fmedge.commands.prompts import PromptLine

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
"""

SHAPES = "How draws are shaped"
TOKENS = "Which tokens"
ENDS = "Where completions end"
FORMS = "What the text must follow: one of these (needs pip install 'fmedge\\[constraints]')"


def command(
    bundle: Annotated[
        Path, typer.Argument(help="Folder of the bundle, or of a decoder that optimum or onnxruntime-genai exported.")
    ],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; all are served in one batch.")] = None,
    source: Annotated[
        str | None,
        typer.Option("--input", "-i", help="File with prompts: one on each line, or .jsonl; - is stdin."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Write completions to a .jsonl file; - is stdout.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a job from --input to --output where it was interrupted.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output of an earlier job.")] = False,
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
    n: Annotated[int | None, typer.Option("--n", help="Completions for each prompt.", rich_help_panel=SHAPES)] = None,
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
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the bundle's target unless given.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Rows that are decoded together at most.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU; all cores unless given.")] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="What weights, working memory and cache may take (6GiB); what is free, if not given.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line for each completion.")] = False,
) -> None:
    """Complete prompts, all in one batch. Options that are not given are the bundle's own.

    From a file to a file, prompts are read as rows get free, and results are written as they finish, with the "id" of
    their line or its number: of any size, and --resume continues after an interruption.

    Exits with 1 if a prompt could not be served; the others are completed all the same.
    """
    from fmedge_runtimes.engine import DEFAULTS
    from fmedge_runtimes.load import load

    from fmedge.commands.completions import write_completions
    from fmedge.commands.console import progress_bar
    from fmedge.commands.job import opened, run_job
    from fmedge.commands.prompts import read_prompts

    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat.")
    if logprobs is not None and not as_json and output is None:
        raise typer.BadParameter("--logprobs needs --json or --output: plain text has no place for them.")
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
    changes = checked({name: value for name, value in given.items() if value is not None})
    job = source not in (None, "-") and output not in (None, "-") and not prompts
    if (resume or force) and not job:
        raise typer.BadParameter(
            "--resume and --force are for jobs: --input FILE, --output FILE, and no other prompts."
        )
    if resume and force:
        raise typer.BadParameter("--resume continues the output and --force replaces it; give one of them.")
    lines = [] if job else read_prompts(prompts or [], source)
    with (
        opened(Path(str(source)), Path(str(output)), resume=resume, force=force) if job else nullcontext() as opening,
        load(
            bundle,
            device=device,
            max_batch=DEFAULTS.max_batch if max_batch is None else max_batch,
            threads=threads,
            memory=memory,
        ) as model,
    ):
        base = replace(model.default_sampling, **changes)

        def ask(line: PromptLine) -> tuple[Prompt, Sampling]:
            return _prompt(model, line, chat=chat, system=system), line.sampling(base)

        if opening is not None:
            results, done = opening
            with progress_bar() as report:
                run_job(model, Path(str(source)), results, done, ask, report)
            failed = done.failed
            if failed:
                typer.echo(f'fmedge: {failed} of {done.count} prompts failed; see "error" in {output}.', err=True)
        else:
            asked = [ask(line) for line in lines]
            requests, samplings = [prompt for prompt, _ in asked], [sampling for _, sampling in asked]
            deltas = _with_notes(model.stream(requests, samplings), samplings)
            failed = write_completions(deltas, requests, [line.id for line in lines], output=output, as_json=as_json)
    if failed:
        raise typer.Exit(1)


def _with_notes(deltas: Iterable[Delta], samplings: Sequence[Sampling]) -> Iterator[Delta]:
    """The same deltas; says on stderr which constrained texts were cut off, as plain text does not show it."""
    for delta in deltas:
        yield delta
        done, constraint = delta.completion, samplings[delta.prompt_index].constraint
        if done is not None and constraint is not None and done.finish_reason in ("length", "context"):
            typer.echo(
                f"fmedge: prompt {delta.prompt_index}: cut off after {len(done.tokens)} tokens ({done.finish_reason}), "
                f"so the text may be incomplete ({constraint[0]}); raise --max-new-tokens.",
                err=True,
            )


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

"""What `fmedge generate` does with a bundle that writes text: prompts to completions, or a job from file to file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from fmedge_runtimes.engine import DEFAULTS
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.load import load_text

from fmedge.commands.call import Call
from fmedge.commands.completions import write_completions
from fmedge.commands.console import progress_bar
from fmedge.commands.job import opened, run_job
from fmedge.commands.prompts import PromptLine, read_prompts

if TYPE_CHECKING:
    from fmedge_runtimes.completion import Delta
    from fmedge_runtimes.sampling import Sampling
    from fmedge_runtimes.text import Prompt, TextModel


def generate_texts(call: Call, changes: Mapping[str, Any], *, resume: bool, chat: bool, system: str | None) -> None:
    """Complete all prompts; `changes` are the fields of Sampling that differ from the bundle's own.

    Raises typer.Exit(1) if a prompt failed, a usage error for options that contradict each other, and FmedgeError.
    """
    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat.")
    if changes.get("logprobs") is not None and not call.as_json and call.output is None:
        raise typer.BadParameter("--logprobs needs --json or --output: plain text has no place for them.")
    source, output = call.source, call.output
    job = source not in (None, "-") and output not in (None, "-") and not call.prompts
    if (resume or call.force) and not job:
        raise typer.BadParameter(
            "--resume and --force are for jobs: --input FILE, --output FILE, and no other prompts."
        )
    if resume and call.force:
        raise typer.BadParameter("--resume continues the output and --force replaces it; give one of them.")
    lines = [] if job else read_prompts(call.prompts, source)
    with (
        opened(Path(str(source)), Path(str(output)), resume=resume, force=call.force)
        if job
        else nullcontext() as opening,
        load_text(
            call.bundle,
            device=call.device,
            max_batch=DEFAULTS.max_batch if call.max_batch is None else call.max_batch,
            threads=call.threads,
            memory=call.memory,
            cuda_graphs=call.cuda_graphs,
            prefill_graph=call.prefill_graph,
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
            failed = write_completions(
                deltas, requests, [line.id for line in lines], output=output, as_json=call.as_json
            )
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

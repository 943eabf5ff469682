"""How completions reach the terminal, a file or another program."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import typer
from fmedge_runtimes.completion import Completion, Delta
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.text import Prompt

from fmedge.commands.prompts import LineId


def write_completions(
    deltas: Iterable[Delta],
    prompts: Sequence[Prompt],
    ids: Sequence[LineId | None],
    *,
    output: str | None,
    as_json: bool,
) -> int:
    """Write completions as they come; returns how many prompts failed, whose reasons are on stderr.

    In JSON, a prompt that has an id gets it back.

    One prompt streams as plain text. Several appear side by side on a terminal, and one after the other, each when it
    is complete, elsewhere. A .jsonl file is complete or not there.
    """
    if output is not None and output != "-":
        with _complete_file(Path(output)) as file:
            return _consume(deltas, on_completion=lambda completion: _json_line(completion, ids, file))
    if as_json or output == "-":
        return _consume(deltas, on_completion=lambda completion: _json_line(completion, ids, sys.stdout))
    if len(prompts) > 1 and sys.stdout.isatty():
        return _side_by_side(deltas, prompts)
    if len(prompts) > 1:
        return _consume(deltas, on_completion=lambda completion: _block(completion, prompts))
    return _stream(deltas)


def _consume(deltas: Iterable[Delta], on_completion: Callable[[Completion], None]) -> int:
    failed = 0
    for delta in deltas:
        if delta.completion is not None:
            on_completion(delta.completion)
            failed += _report_error(delta.completion)
    return failed


def _report_error(completion: Completion) -> int:
    if completion.error is None:
        return 0
    typer.echo(f"fmedge: prompt {completion.prompt_index}: {completion.error}", err=True)
    return 1


def _json_line(completion: Completion, ids: Sequence[LineId | None], file: TextIO) -> None:
    identity = ids[completion.prompt_index]
    record = ({} if identity is None else {"id": identity}) | asdict(completion)
    record["error"] = None if completion.error is None else str(completion.error)
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def _block(completion: Completion, prompts: Sequence[Prompt]) -> None:
    if completion.error is None:
        typer.echo(f"--- {_title(completion, prompts)}\n{_shown(completion)}")


def _title(completion: Completion | Delta, prompts: Sequence[Prompt]) -> str:
    prompt = prompts[completion.prompt_index]
    words = prompt.replace("\n", "\\n") if isinstance(prompt, str) else f"{len(prompt)} token ids"
    number = f"{completion.prompt_index}" + (f".{completion.index}" if completion.index else "")
    return f"[{number}] {words[:60]}{'...' if len(words) > 60 else ''}"


def _shown(completion: Completion) -> str:
    """The text; the ids where the bundle has no tokenizer to make text of them."""
    return completion.text or " ".join(map(str, completion.tokens))


def _stream(deltas: Iterable[Delta]) -> int:
    """Plain text as it comes; more completions of the same prompt follow below, each when it is complete."""
    failed = 0
    others: list[Completion] = []
    for delta in deltas:
        if delta.index == 0:
            typer.echo(delta.text, nl=False)
            sys.stdout.flush()
        if delta.completion is None:
            continue
        failed += _report_error(delta.completion)
        if delta.index > 0:
            others.append(delta.completion)
        elif delta.completion.error is None:
            typer.echo("" if delta.completion.text else _shown(delta.completion))
    for completion in sorted(others, key=lambda item: item.index):
        typer.echo(f"--- [{completion.index}]\n{_shown(completion)}")
    return failed


def _side_by_side(deltas: Iterable[Delta], prompts: Sequence[Prompt]) -> int:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    texts: dict[tuple[int, int], tuple[str, str]] = {}
    failed = 0

    def view() -> Group:
        parts = []
        for _, (title, text) in sorted(texts.items()):
            parts += [Text(title, style="bold cyan"), Text(text), Text("")]
        return Group(*parts)

    with Live(console=Console(), refresh_per_second=12, vertical_overflow="ellipsis") as live:
        for delta in deltas:
            key = (delta.prompt_index, delta.index)
            title, text = texts.get(key, (_title(delta, prompts), ""))
            texts[key] = (title, text + delta.text)
            if delta.completion is not None:
                texts[key] = (title, _shown(delta.completion))
                failed += _report_error(delta.completion)
            live.update(view())
        # What did not fit on the screen while it grew is shown whole at the end.
        live.vertical_overflow = "visible"
    return failed


@contextmanager
def _complete_file(path: Path) -> Iterator[TextIO]:
    """A file that takes its name when it is complete; what was there before stays until then."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)

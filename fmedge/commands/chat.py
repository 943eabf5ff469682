"""`fmedge chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fmedge_runtimes.errors import FmedgeError, RequestError
from fmedge_runtimes.sampling import checked

from fmedge.commands.byte_size import parse_bytes
from fmedge.commands.chat_input import read_message
from fmedge.commands.device_options import DEVICE_HELP, GRAPHS_HELP, PrefillOption

if TYPE_CHECKING:
    from fmedge_runtimes.completion import Completion
    from fmedge_runtimes.sampling import Sampling
    from fmedge_runtimes.text import TextModel

EPILOG = """
[bold]Examples[/bold]

  fmedge chat out/bundle

  fmedge chat out/bundle --system "Answer in one sentence." --temperature 0.7

  fmedge chat out/bundle --tools tools.json

  printf "Hi\\nWhat is a tuple?\\n" | fmedge chat out/bundle
"""
HELP = '''/help            show this
/reset           forget the conversation; the system message stays
/system [TEXT]   set the system message; show it without TEXT
/save FILE       write the conversation as JSON messages
/exit            leave; so does the end of input
A line that ends in \\ goes on in the next one; lines between two lines of """ are one message.
A message that begins with / is written with //. Ctrl-C stops the reply.'''
LONGEST_REPLY = 1024


def command(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    tools: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON list of tool definitions, for templates that take them.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help=f"Tokens of a reply at most; {LONGEST_REPLY} or half the context, if not given.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; above 0 draws.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that sum to p; 1 is off.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens at least this times as likely as the likeliest; 0 is off.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes draws reproducible.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU; all cores unless given.")] = None,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help=GRAPHS_HELP)] = True,
    prefill_graph: PrefillOption = "prompts",
    memory: Annotated[
        int | None,
        typer.Option(parser=parse_bytes, metavar="SIZE", help="What all may take (6GiB); what is free, if not given."),
    ] = None,
) -> None:
    """Talk with a model. /help, typed in the chat, says what else can be done there.

    Without a terminal each line of the input is a message; exits with 1 then if one of them had no reply.
    """
    from fmedge_runtimes.load import load_text

    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    changes = checked({name: value for name, value in given.items() if value is not None})
    listed = None if tools is None else _read_tools(tools)
    with load_text(
        bundle,
        device=device,
        max_batch=1,
        threads=threads,
        memory=memory,
        cuda_graphs=cuda_graphs,
        prefill_graph=prefill_graph,
    ) as model:
        changes.setdefault("max_new_tokens", min(LONGEST_REPLY, max(1, model.context // 2)))
        chat = _Chat(model, replace(model.default_sampling, **changes), system, listed)
        failed = _converse(chat)
    if failed and not sys.stdin.isatty():
        raise typer.Exit(1)


def _read_tools(path: Path) -> list[dict[str, Any]]:
    try:
        tools = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise RequestError(f"{path} is not JSON ({error}).") from error
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise RequestError(f"{path} must be a JSON list of tool definitions, each an object.")
    return tools


def _notice(text: str) -> None:
    typer.secho(text, err=True, dim=sys.stderr.isatty() or None)


class _Chat:
    """A conversation, and what of it the model still sees."""

    def __init__(
        self, model: TextModel, sampling: Sampling, system: str | None, tools: list[dict[str, Any]] | None
    ) -> None:
        self.model, self.sampling, self.system, self.tools = model, sampling, system, tools
        self.turns: list[dict[str, str]] = []
        self.forgotten = 0
        """Of `turns`, those at the beginning that the context has no room for any more."""
        # A model that cannot chat is told at once, not after the first message.
        self._tokens([{"role": "user", "content": "Hi"}])

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole conversation."""
        return self._with_system(self.turns)

    def _with_system(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        return turns if self.system is None else [{"role": "system", "content": self.system}, *turns]

    def _tokens(self, turns: list[dict[str, str]]) -> list[int]:
        return self.model.chat_prompt(self._with_system(turns), self.tools)

    def prompt(self) -> list[int]:
        """The conversation as tokens [S]; drops the oldest turns until a reply has room."""
        before = self.forgotten
        room = min(self.sampling.max_new_tokens, self.model.context // 2)
        tokens = self._tokens(self.turns[self.forgotten :])
        while len(tokens) + room > self.model.context and self.forgotten + 2 < len(self.turns):
            self.forgotten += 2  # a message and its reply
            tokens = self._tokens(self.turns[self.forgotten :])
        if self.forgotten > before:
            count = (self.forgotten - before) // 2
            _notice(f"(the context is full: the oldest {'turn is' if count == 1 else f'{count} turns are'} dropped)")
        return tokens

    def reply(self, message: str) -> bool:
        """Print the reply to a message as it comes; False, and as if never said, if there is none."""
        self.turns.append({"role": "user", "content": message})
        text, done, problem = "", None, None
        try:
            for delta in self.model.stream([self.prompt()], self.sampling):
                text += delta.text
                typer.echo(delta.text, nl=False)
                sys.stdout.flush()
                done = delta.completion
            problem = done.error if done is not None else None
        except KeyboardInterrupt:
            _notice("\n(stopped)")
        except FmedgeError as error:
            problem = error
        if problem is not None:
            self.turns.pop()
            _notice(f"fmedge: {problem}")
            return False
        typer.echo()
        _tell_end(done)
        self.turns.append({"role": "assistant", "content": text})
        return True


def _tell_end(done: Completion | None) -> None:
    if done is not None and done.finish_reason == "length":
        _notice(f"(cut off after {len(done.tokens)} tokens; --max-new-tokens allows more)")
    if done is not None and done.finish_reason == "context":
        _notice("(cut off: the context is full; /reset makes room)")


def _converse(chat: _Chat) -> int:
    """Messages and commands until the end; how many had no reply."""
    failed = 0
    if sys.stdin.isatty():
        _notice("/help shows what can be done here; /exit leaves.")
    while True:
        try:
            message = read_message()
        except KeyboardInterrupt:
            _notice("\n(/exit or the end of input leaves)")
            continue
        except UnicodeDecodeError:
            _notice("fmedge: the input is not UTF-8 text.")
            return failed + 1
        if message is None or message.strip() == "/exit":
            return failed
        if message.startswith("/") and not message.startswith("//"):
            failed += not _obey(chat, message)
        elif message.strip():
            failed += not chat.reply(message.removeprefix("/") if message.startswith("//") else message)


def _obey(chat: _Chat, line: str) -> bool:
    """Do what a line with a slash says; whether it could be done."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name == "/help":
        _notice(HELP)
    elif name == "/reset":
        chat.turns, chat.forgotten = [], 0
        _notice("(the conversation is forgotten)")
    elif name == "/system" and rest:
        chat.system = rest
        _notice("(the system message is set)")
    elif name == "/system":
        _notice(chat.system or "(there is no system message)")
    elif name == "/save" and rest:
        return _save(chat, Path(rest).expanduser())
    else:
        _notice(
            f"fmedge: {name} needs a file." if name == "/save" else f"fmedge: there is no {name}; /help says what is."
        )
        return False
    return True


def _save(chat: _Chat, path: Path) -> bool:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(chat.messages, ensure_ascii=False, indent=1) + "\n", "utf-8")
        partial.replace(path)
    except (OSError, ValueError) as error:
        _notice(f"fmedge: cannot write {path}: {getattr(error, 'strerror', None) or error}.")
        return False
    _notice(f"({len(chat.messages)} messages saved to {path})")
    return True

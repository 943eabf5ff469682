"""Chat templates: messages to the prompt text that a model was trained on. It knows nothing of tokens.

    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    prompt = template.render([{"role": "user", "content": "Hello"}])

Templates come with models, so they are foreign code: they run in Jinja's sandbox, on copies of plain data. What they
are offered there is what transformers offers (transformers.utils.chat_template_utils, 5.23), and so is the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from fmedge_runtimes.errors import RequestError

Message = Mapping[str, object]
"""One turn of a chat: "role", "content", and what else the template reads ("tool_calls", "name", ...)."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message can bring its reasoning; templates read the first, some the second."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja template as models ship it, and the special tokens that it names (bos_token, eos_token, ...)."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def takes_tools(self) -> bool:
        """Whether the template reads the tools that it is given. Raises RequestError when it is faulty."""
        environment = _compiled(self.source).environment
        return "tools" in jinja2.meta.find_undeclared_variables(environment.parse(self.source))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt for a chat; it has its special tokens already, so encode it with special=False.

        `tools` are JSON schemas of functions, `variables` what this one template knows (enable_thinking, ...).
        Raises RequestError with the template's own words when it refuses the messages, and when it is faulty.
        """
        if not messages:
            raise RequestError("the chat has no messages; give at least one.")
        values: dict[str, object] = {
            "documents": None,
            **self.special_tokens,
            **(variables or {}),
            "messages": [_message(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        template = _compiled(self.source)
        try:
            return template.render({name: _plain(value) for name, value in values.items()})
        except RequestError:
            raise
        except _Refusal as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # a template can fail in every way that code can
            raise RequestError(f"the chat template fails on these messages: {type(error).__name__}: {error}") from error


class _Refusal(Exception):
    """A template called raise_exception."""


def _message(message: Message) -> dict[str, object]:
    """A message as templates expect it: nothing that is None, and reasoning under the names they read."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{message!r} is not a chat message; give a mapping with 'role' and 'content'.")
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    if reasoning is not None:
        given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
    return given


def _plain(value: object) -> object:
    """A copy in plain JSON types: the sandbox does not know which methods of other objects are harmful."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if value is None or isinstance(value, bool):
        return value
    # Subclasses (enums, ...) go back to the base type; what they make of __str__ is not asked.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    raise RequestError(
        f"a chat template cannot take a {type(value).__name__}; give strings, numbers, lists and mappings."
    )


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"the chat template has a syntax error in line {error.lineno}: {error.message}; "
            "correct the model's template and export it again."
        ) from error
    except Exception as error:  # Python's own compiler can refuse too deep nesting
        raise RequestError(f"the chat template cannot be compiled: {type(error).__name__}: {error}") from error


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}: marks an assistant's text for training; no effect here."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which models have not seen in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """`dict` without the attributes of the type."""

    def __call__(self, *args: Iterable[tuple[str, object]], **named: object) -> dict[str, object]:
        return dict(*args, **named)

    def fromkeys(self, keys: Iterable[str], value: object = None) -> dict[str, object]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace` that stores no names with an underscore, by which CPython's internals could be reached."""

    # As in Jinja's own, no parameter is called self, so that namespace(self=...) works.
    def __init__(*args: Any, **named: object) -> None:  # noqa: ANN401 - Jinja's signature
        attributes = dict(*args[1:], **named)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: the name begins with an underscore")

"""How the next token is chosen: the options of a request. `sampler.py` applies them; docs/sampling.md defines each.

Sampling(max_new_tokens=64, temperature=0.7, top_p=0.9, seed=1)
"""

from __future__ import annotations

import json as json_text
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, SupportsIndex

from fmedge_runtimes.errors import RequestError

ConstraintKind = Literal["json_schema", "regex", "grammar"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options of one request; the defaults are greedy decoding.

    Lists are taken where tuples are declared, and are kept as tuples. Raises RequestError when a value is outside its
    range, or when two options contradict each other.
    """

    max_new_tokens: int = 128
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 takes the most likely token; above 0 draws from softmax(logits / temperature)."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probabilities sum to top_p; 1 is off."""
    min_p: float = 0.0
    """Draw from tokens at least min_p times as likely as the most likely one; 0 is off."""
    typical_p: float = 1.0
    """Draw from the tokens whose information is nearest to the expected one, until they sum to typical_p; 1 is off."""
    repetition_penalty: float = 1.0
    """Divide (multiply, if negative) the logits of tokens seen in prompt or completion; 1 is off."""
    presence_penalty: float = 0.0
    """Subtract from the logits of tokens seen in the completion."""
    frequency_penalty: float = 0.0
    """Subtract, once per occurrence, from the logits of tokens seen in the completion."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """Add to the logits of tokens: {id: bias}; kept as pairs in the order of the ids."""
    banned_tokens: tuple[int, ...] = ()
    """Ids that are never generated."""
    forced_tokens: tuple[int, ...] = ()
    """Ids that the completion begins with."""
    min_new_tokens: int = 0
    """End-of-sequence and stop tokens cannot come before so many tokens; stop strings can."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; they are not part of its text."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the completion, as end-of-sequence tokens do; they are not part of its text."""
    ignore_eos: bool = False
    """Go on past end-of-sequence tokens (for measurements)."""
    json: bool = False
    """The text is a JSON object."""
    json_schema: Mapping[str, Any] | str | None = None
    """The text is JSON that this JSON Schema allows; kept as JSON text."""
    regex: str | None = None
    """The text matches this regular expression as a whole."""
    grammar: str | None = None
    """The text follows this context-free grammar, in Lark or GBNF notation."""
    n: int = 1
    """Completions for each prompt."""
    best_of: int | None = None
    """Generate so many and give the n of highest log-probability / tokens ** length_penalty, best first."""
    length_penalty: float = 1.0
    """With best_of: 1 compares the mean log-probability of the tokens, 0 their sum."""
    logprobs: int | None = None
    """Give the log-probability of each token, and of so many likeliest ones in its place; None gives none."""
    seed: int | None = None
    """Draws depend on (seed, completion index, position) alone; None takes a fresh seed."""

    def __post_init__(self) -> None:
        for name, value in checked({item.name: getattr(self, item.name) for item in fields(self)}).items():
            object.__setattr__(self, name, value)
        self._check_together()

    @property
    def rows(self) -> int:
        """Completions that are generated: best_of, or n."""
        return self.n if self.best_of is None else self.best_of

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """logit_bias in the form in which it is kept."""
        return tuple(self.logit_bias.items()) if isinstance(self.logit_bias, Mapping) else self.logit_bias

    @property
    def constraint(self) -> tuple[ConstraintKind, str] | None:
        """What the text must follow, and in which language that is said."""
        if self.json:
            return "json_schema", '{"type": "object"}'
        if self.json_schema is not None:
            return "json_schema", str(self.json_schema)
        if self.regex is not None:
            return "regex", self.regex
        return None if self.grammar is None else ("grammar", self.grammar)

    def check_vocabulary(self, size: int) -> None:
        """Raise RequestError if an option names a token id that a model with `size` tokens does not have."""
        named = {
            "logit_bias": tuple(token for token, _ in self.biases),
            "banned_tokens": self.banned_tokens,
            "forced_tokens": self.forced_tokens,
            "stop_token_ids": self.stop_token_ids,
        }
        for name, tokens in named.items():
            wrong = next((token for token in tokens if token >= size), None)
            if wrong is not None:
                raise RequestError(f"Sampling.{name} has token id {wrong}; the vocabulary has {size} tokens.")

    def _check_together(self) -> None:
        constraints = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        constraints = ["json", *constraints] if self.json else constraints
        if len(constraints) > 1:
            raise RequestError(f"Sampling has {' and '.join(constraints)}; a text can follow one of them.")
        if constraints and self.stop:
            raise RequestError(
                f"Sampling has {constraints[0]} and stop: a stop string would cut the text before it is complete; "
                "leave it out, or let the constraint say where the text ends."
            )
        if constraints and self.ignore_eos:
            raise RequestError(f"Sampling has {constraints[0]} and ignore_eos: a complete text must be able to end.")
        if self.min_new_tokens > self.max_new_tokens:
            raise RequestError(
                f"Sampling.min_new_tokens is {self.min_new_tokens}, above max_new_tokens, which is "
                f"{self.max_new_tokens}."
            )
        if len(self.forced_tokens) > self.max_new_tokens:
            raise RequestError(
                f"Sampling.forced_tokens has {len(self.forced_tokens)} ids, more than max_new_tokens, which is "
                f"{self.max_new_tokens}."
            )
        both = set(self.forced_tokens) & set(self.stop_token_ids)
        if constraints and both:
            raise RequestError(
                f"Sampling.forced_tokens has token id {min(both)}, which ends the text before it can follow "
                f"{constraints[0]}: it is one of stop_token_ids."
            )
        both = set(self.forced_tokens) & set(self.banned_tokens)
        if both:
            raise RequestError(f"Sampling.forced_tokens and banned_tokens both have token id {min(both)}.")
        if self.best_of is None and self.length_penalty != 1.0:
            raise RequestError(f"Sampling.length_penalty is {self.length_penalty}, which only best_of uses.")
        if self.best_of is not None and self.n > self.best_of:
            raise RequestError(f"Sampling.n is {self.n}, above best_of, which is {self.best_of}.")
        if self.best_of is not None and self.best_of > 1 and self.temperature == 0.0:
            raise RequestError(
                f"Sampling.best_of is {self.best_of} and temperature 0, which makes all candidates equal; "
                "use a temperature above 0."
            )


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of single options, by name, in the form in which Sampling keeps them.

    Raises RequestError when one is outside its range; whether they go together, Sampling itself says.
    """
    known = {name: _normal(name, value) for name, value in values.items()}
    for name, valid, wanted in _RULES:
        if name in known and not _holds(valid, known[name]):
            raise RequestError(f"Sampling.{name} is {known[name]!r}; it must be {wanted}.")
    return known


def _holds(valid: Callable[[Any], bool], value: Any) -> bool:  # noqa: ANN401 - what a user gave
    try:
        return valid(value)
    except TypeError:
        return False


def _normal(name: str, value: Any) -> Any:  # noqa: ANN401 - as it came from Python or from JSON
    if name == "json_schema" and isinstance(value, Mapping):
        return json_text.dumps(value)
    if name not in _TUPLES or isinstance(value, str) or not isinstance(value, Iterable):
        return value
    try:
        if name == "stop":
            return tuple(value)
        if name == "logit_bias":
            pairs = value.items() if isinstance(value, Mapping) else value
            # int, because JSON has no keys but strings.
            return tuple(sorted((int(token), float(bias)) for token, bias in pairs))
        # True is no token id, although it has an index.
        return tuple(token if isinstance(token, bool) else operator.index(token) for token in value)
    except (TypeError, ValueError):
        return value


def _is_whole(value: Any) -> bool:  # noqa: ANN401 - what a user gave
    return isinstance(value, SupportsIndex) and not isinstance(value, bool)


def _are_ids(value: Any) -> bool:  # noqa: ANN401 - what a user gave
    return isinstance(value, tuple) and all(_is_whole(token) and token >= 0 for token in value)


def _is_bias(value: Any) -> bool:  # noqa: ANN401 - what a user gave
    if not isinstance(value, tuple) or not all(isinstance(pair, tuple) for pair in value):
        return False
    tokens = {token for token, _ in value}
    return _are_ids(tuple(tokens)) and len(tokens) == len(value) and all(math.isfinite(bias) for _, bias in value)


def _is_json(value: Any) -> bool:  # noqa: ANN401 - what a user gave
    try:
        json_text.loads(value)
    except ValueError:
        return False
    return True


_TUPLES = ("logit_bias", "banned_tokens", "forced_tokens", "stop", "stop_token_ids")
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_new_tokens", lambda value: _is_whole(value) and value >= 1, "at least 1"),
    ("temperature", lambda value: 0.0 <= value < math.inf, "0 or more"),
    ("top_k", lambda value: _is_whole(value) and value >= 0, "0 (off) or more"),
    ("top_p", lambda value: 0.0 < value <= 1.0, "above 0 and at most 1 (off)"),
    ("min_p", lambda value: 0.0 <= value <= 1.0, "from 0 (off) to 1"),
    ("typical_p", lambda value: 0.0 < value <= 1.0, "above 0 and at most 1 (off)"),
    ("repetition_penalty", lambda value: 0.0 < value < math.inf, "above 0 (1 is off)"),
    ("presence_penalty", math.isfinite, "finite"),
    ("frequency_penalty", math.isfinite, "finite"),
    ("logit_bias", _is_bias, "finite biases by token id, one for each"),
    ("banned_tokens", _are_ids, "token ids"),
    ("forced_tokens", _are_ids, "token ids"),
    ("min_new_tokens", lambda value: _is_whole(value) and value >= 0, "0 (off) or more"),
    ("stop", lambda value: isinstance(value, tuple), "a tuple of strings"),
    ("stop", lambda value: all(isinstance(text, str) and text for text in value), "non-empty strings"),
    ("stop_token_ids", _are_ids, "token ids"),
    ("ignore_eos", lambda value: isinstance(value, bool), "true or false"),
    ("json", lambda value: isinstance(value, bool), "true or false"),
    ("json_schema", lambda value: value is None or _is_json(value), "a JSON Schema, as a dict or as JSON text"),
    ("regex", lambda value: value is None or isinstance(value, str), "a regular expression"),
    ("grammar", lambda value: value is None or isinstance(value, str), "a grammar in Lark or GBNF notation"),
    ("n", lambda value: _is_whole(value) and value >= 1, "at least 1"),
    ("best_of", lambda value: value is None or (_is_whole(value) and value >= 1), "at least 1"),
    ("length_penalty", math.isfinite, "finite"),
    ("logprobs", lambda value: value is None or (_is_whole(value) and value >= 0), "0 or more"),
    ("seed", lambda value: value is None or (_is_whole(value) and 0 <= value < 2**64), "from 0 to 2**64 - 1"),
)

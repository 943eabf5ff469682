"""Multiple-choice questions: read from JSON lines, answered by what a model finds likeliest.

    questions = read_questions(Path("questions.jsonl"))
    accuracy = answer(bundle, decoder, tokenizer, questions, template=None, report=print)

Scored as EleutherAI's lm-evaluation-harness does it: the logarithm of the probability of each choice behind the
question, whole, and divided by the bytes of the choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fmedge_runtimes.bundle import Bundle
from fmedge_runtimes.chat import ChatTemplate
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.errors import DataError, ParityError
from fmedge_runtimes.likelihood import Sums
from fmedge_runtimes.tokenizer import Tokenizer

FORMATS = (
    '{"question", "choices": [...], "answer"}, ARC\'s {"question", "choices": {"text", "label"}, "answerKey"} or '
    'HellaSwag\'s {"ctx", "endings", "label"}'
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its choices."""

    line: int
    text: str
    continues: bool
    """Whether a choice goes on with the text, as in HellaSwag; else it answers it."""
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class ChoiceAccuracy:
    """How many questions a model answers rightly."""

    questions: int
    chance: float
    """What guessing gives."""
    accuracy: float
    """By the likeliest choice."""
    accuracy_per_byte: float
    """By the choice that is likeliest for its length."""


def read_questions(path: Path) -> list[Question]:
    """The questions of a file of JSON lines, in any of FORMATS. Raises DataError with the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read the questions {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it first.") from error
    questions = [_question(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise DataError(f"{path} holds no questions; give JSON lines such as {FORMATS}.")
    return questions


def _question(path: Path, number: int, line: str) -> Question:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise _WrongLineError(f"a JSON object is needed, not {type(record).__name__}")
        return _parsed(number, record)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _WrongLineError) else f"it is not JSON ({error})"
        raise DataError(f"{path}:{number}: {reason}; known are {FORMATS}.") from error


class _WrongLineError(ValueError):
    """What is wrong with a line."""


def _parsed(number: int, record: dict[str, Any]) -> Question:
    forms = [
        keys
        for keys in (("choices", "answer"), ("choices", "answerKey"), ("endings", "label"))
        if set(keys) <= set(record)
    ]
    if len(forms) != 1:
        found = ", ".join(sorted(record)) or "none"
        raise _WrongLineError(f"its fields ({found}) are {'those of several formats' if forms else 'no question'}")
    ((choices_key, answer_key),) = forms
    continues = choices_key == "endings"
    text, given, answer = record.get("ctx" if continues else "question"), record[choices_key], record[answer_key]
    choices, labels = given, None
    if isinstance(given, dict):
        choices, labels = given.get("text"), given.get("label")
        if not isinstance(labels, list) or not isinstance(choices, list) or len(labels) != len(choices):
            raise _WrongLineError('"choices" needs "text" and "label" of one length')
    if not isinstance(text, str) or not text.strip():
        raise _WrongLineError(f'"{"ctx" if continues else "question"}" must be a text')
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(one, str) and one.strip() for one in choices)
    ):
        raise _WrongLineError(f'"{choices_key}" must be two texts or more')
    return Question(number, text, continues, tuple(choices), _index(answer, len(choices), labels, counted=continues))


def _index(answer: object, count: int, labels: list[Any] | None, *, counted: bool) -> int:
    """The number of the right choice, from 0; `counted` says that digits in a text count from 0."""
    index = -1
    if labels is not None:
        if labels.count(answer) == 1:
            index = labels.index(answer)
    elif isinstance(answer, int) and not isinstance(answer, bool):
        index = answer
    elif isinstance(answer, str) and counted and answer.isdecimal():
        index = int(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer.isascii() and answer.isalpha():
        index = ord(answer.upper()) - ord("A")
    if not 0 <= index < count:
        raise _WrongLineError(f"its answer {answer!r} is none of its {count} choices (a letter, or a number from 0)")
    return index


def answer(
    bundle: Bundle,
    decoder: Decoder,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    template: ChatTemplate | None,
    report: Callable[[int, int], None],
) -> ChoiceAccuracy:
    """Have a model answer questions, as turns of a chat if there is a template.

    Raises DataError for a question that is longer than the context, ParityError for logits that are not finite.
    """
    cache = decoder.new_cache()
    right = np.zeros(2, np.int64)  # [2]: by the likeliest, and by the likeliest for its length
    for number, question in enumerate(questions):
        report(number, len(questions))
        before, answers = _prompt(question, template)
        special = template is None
        start, rows = _encoded(tokenizer, before, answers, special=special)
        if max(map(len, rows)) > decoder.facts.context:
            raise DataError(
                f"the question of line {question.line} takes {max(map(len, rows))} tokens, and the context of "
                f"{bundle.folder} is {decoder.facts.context}; take it out, or export with a longer --context."
            )
        likelihoods = np.empty(len(rows))  # [C]
        for choice, ids in enumerate(rows):
            sums, position = Sums(), start
            for logits in decoder.predict(cache, ids, start):
                sums.add(logits, ids[position : position + len(logits)])
                position += len(logits)
            if sums.not_finite:
                raise ParityError(f"{bundle.folder}: line {question.line} gives logits that are not finite.")
            likelihoods[choice] = -sums.nats
        lengths = np.array([len(text.encode()) for text in question.choices])  # [C]
        right += [likelihoods.argmax() == question.answer, (likelihoods / lengths).argmax() == question.answer]
    return ChoiceAccuracy(
        questions=len(questions),
        chance=float(np.mean([1 / len(question.choices) for question in questions])),
        accuracy=float(right[0] / len(questions)),
        accuracy_per_byte=float(right[1] / len(questions)),
    )


def _prompt(question: Question, template: ChatTemplate | None) -> tuple[str, list[str]]:
    """The text before the choices, and each choice as it stands behind it."""
    if template is not None:
        return template.render([{"role": "user", "content": question.text}]), list(question.choices)
    before = question.text if question.continues else f"Question: {question.text}\nAnswer:"
    return before, [f" {choice}" for choice in question.choices]


def _encoded(
    tokenizer: Tokenizer, before: str, answers: Sequence[str], *, special: bool
) -> tuple[int, list[list[int]]]:
    """The token ids of each answer behind its question, and where they begin to differ from the question's own.

    All answers of a question are scored from one token on, so that the same of the question is left out of each.
    """
    alone = tokenizer.encode(before, special=special)
    rows = [tokenizer.encode(before + text, special=special) for text in answers]
    start = min(_common(alone, row) for row in rows)
    if start:
        return start, rows
    # Nothing stands before what is scored: the first token of all rows is taken as given.
    return 1, rows


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))

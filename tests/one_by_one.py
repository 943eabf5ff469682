"""What a request gets from the fake decoder when it is alone: one sequence, one token at a time, no cache."""

import functools
import itertools
import re
import tempfile
from pathlib import Path

from fake_session import CONTEXT, EOS, LETTERS, PLAIN, VOCABULARY, letters_tokenizer, logits_of
from fmedge_runtimes.constraint import Constraints
from fmedge_runtimes.sampler import NO_TOKEN, Row, choose
from fmedge_runtimes.tokenizer import Tokenizer


def alone(prompt, sampling, index=0, seed=None, layers=PLAIN):
    """Tokens, text and finish reason of one completion."""
    tokens = list(encoded(prompt))
    constraint = constraints().compile(sampling) if sampling.constraint is not None else None
    seed = seed or sampling.seed or 0
    state = Row(
        sampling, vocabulary=VOCABULARY, seed=seed, index=index, prompt=tokens, eos=[EOS], constraint=constraint
    )
    made = []
    while True:
        (token,) = choose(logits_of((*tokens, *made), layers)[None], [state])
        if token == NO_TOKEN:
            return made, written(made), "error"
        state.record(int(token))
        made.append(int(token))
        if token == EOS and not sampling.ignore_eos:
            return made, written(made), "eos"
        if token in sampling.stop_token_ids:
            return made, written(made[:-1]), "stop"
        if sampling.regex and re.fullmatch(sampling.regex, written(made)) and not can_go_on(sampling.regex, made):
            return made, written(made), "stop"
        places = [written(made).find(stop) for stop in sampling.stop]
        if max(places, default=-1) >= 0:
            return made, written(made)[: min(place for place in places if place >= 0)], "stop"
        if len(made) == sampling.max_new_tokens:
            return made, written(made), "length"
        if len(tokens) + len(made) == CONTEXT:
            return made, written(made), "context"


@functools.cache
def constraints():
    with tempfile.TemporaryDirectory() as folder:
        letters_tokenizer().save(f"{folder}/tokenizer.json")
        return Constraints(Tokenizer(Path(folder) / "tokenizer.json"), VOCABULARY)


def can_go_on(regex, made):
    return any(re.fullmatch(regex, written(made) + "".join(more)) for more in itertools.product(LETTERS, repeat=1))


def encoded(prompt):
    return [LETTERS.index(letter) for letter in prompt] if isinstance(prompt, str) else prompt


def written(tokens):
    return "".join(LETTERS[token] for token in tokens if token < len(LETTERS))


def facts(completion):
    return list(completion.tokens), completion.text, completion.finish_reason


def expected(prompts, samplings, layers=PLAIN):
    """What each of the completions must be."""
    return [
        alone(prompt, sampling, index, layers=layers)
        for prompt, sampling in zip(prompts, samplings, strict=True)
        for index in range(sampling.n)
    ]

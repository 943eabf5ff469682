"""What a request gets from the fake decoder when it is alone: one sequence, one token at a time, no cache."""

from fake_session import CONTEXT, EOS, LETTERS, PLAIN, VOCABULARY, logits_of
from fmedge_runtimes.sampler import Row, choose


def alone(prompt, sampling, index=0, seed=None, layers=PLAIN):
    """Tokens, text and finish reason of one completion."""
    tokens = list(encoded(prompt))
    state = Row(sampling, vocabulary=VOCABULARY, seed=seed or sampling.seed or 0, index=index, prompt=tokens)
    made = []
    while True:
        (token,) = choose(logits_of((*tokens, *made), layers)[None], [state])
        state.record(int(token))
        made.append(int(token))
        if token == EOS and not sampling.ignore_eos:
            return made, written(made), "eos"
        places = [written(made).find(stop) for stop in sampling.stop]
        if max(places, default=-1) >= 0:
            return made, written(made)[: min(place for place in places if place >= 0)], "stop"
        if len(made) == sampling.max_new_tokens:
            return made, written(made), "length"
        if len(tokens) + len(made) == CONTEXT:
            return made, written(made), "context"


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

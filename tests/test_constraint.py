"""Constraints: what may come next is what the text can go on with, for every kind of tokenizer."""

import json
import re
import sys
import threading

import jsonschema
import numpy as np
import pytest
from fmedge_runtimes import constraint as constraint_module
from fmedge_runtimes.constraint import Constraints
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.sampler import NO_TOKEN, Row, choose, fault
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.tokenizer import TextStream, Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import byte_level, gemma_decoder, sentencepiece, word_level
from test_tokenizer_families import FAMILIES
from tokenizers import decoders

PADDING = 5
MAKERS = {
    "byte-level": byte_level,
    "llama": sentencepiece,
    "gemma": lambda: sentencepiece(gemma_decoder()),
    "metaspace": lambda: sentencepiece(decoders.Metaspace()),
    "wordpiece": lambda: word_level(decoders.WordPiece()),
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "the", "é"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for name, make in MAKERS.items():
        make().save(str(folder / f"{name}.json"))
        tokenizer = Tokenizer(folder / f"{name}.json")
        made[name] = tokenizer, Constraints(tokenizer, tokenizer.vocab_size + PADDING)
    return made


def generate(opened, sampling, logits, eos=()):
    """Tokens, text, and how the completion ended: one row over given logits [S, V], as the text model goes about it."""
    tokenizer, constraints = opened
    state = Row(sampling, vocabulary=logits.shape[1], seed=1, eos=eos, constraint=constraints.compile(sampling))
    stream = TextStream(tokenizer, continues=True)
    tokens = []
    for step in logits:
        (token,) = choose(step[None], [state])
        if token == NO_TOKEN:
            return tokens, stream.text + stream.flush(), fault(step, state)
        ended = state.ends(int(token))
        state.record(int(token))
        tokens.append(int(token))
        if ended is not None:
            return tokens, stream.text + stream.flush(), ended
        stream.push(int(token))
        if state.complete:
            return tokens, stream.text + stream.flush(), "complete"
    return tokens, stream.text + stream.flush(), "accepts" if state.constraint.accepts else "length"


def random_logits(seed, width, steps=150):
    return np.random.default_rng(seed).normal(0, 3, (steps, width)).astype(np.float32)


def eos_of(tokenizer):
    return next(token for token, name in tokenizer.special_tokens().items() if name == "</s>")


leaves = st.sampled_from(
    [
        {"type": "integer", "minimum": -9, "maximum": 9},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 3},
        {"enum": ["the", 'a "b"', 5]},
        {"const": "\u20ac\U0001f600"},
        {"type": "string", "pattern": "^[a-c]{2,4}$"},
    ]
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        inner.map(lambda item: {"type": "array", "items": item, "minItems": 1, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda items: {
                "type": "object",
                "properties": {f"{'ab€'[place]}": item for place, item in enumerate(items)},
                "required": ["a"],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(["byte-level", "llama", "gemma"]), schemas, st.integers(0, 2**32 - 1))
def test_json_that_ends_is_valid(opened, name, schema, seed):
    tokenizer, _ = opened[name]
    sampling = Sampling(temperature=1.0, max_new_tokens=200, json_schema=schema)
    logits = random_logits(seed, tokenizer.vocab_size + PADDING, 200)
    tokens, text, ended = generate(opened[name], sampling, logits, eos=[eos_of(tokenizer)])
    assert tokens
    if ended in ("eos", "complete", "accepts"):
        jsonschema.validate(json.loads(text), schema)
    else:
        assert ended == "length"
        with pytest.raises(ValueError, match=r".*"):
            json.loads(text)


def test_json_mostly_ends(opened):
    # The test above says nothing of texts that do not end.
    tokenizer, _ = opened["llama"]
    ended = [
        generate(
            opened["llama"],
            Sampling(temperature=1.0, json_schema=PERSON),
            random_logits(seed, tokenizer.vocab_size + PADDING, 400),
        )[2]
        for seed in range(20)
    ]
    assert ended.count("complete") >= 15


EXPRESSIONS = ["(the|a|é)+", "a{2,5}", "[a-c]*é?", " ?the( the)*", "\U0001f600|€|x y", "(ab?c?)+z?", "[^a]{3}", ".*"]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(MAKERS)), st.sampled_from(EXPRESSIONS), st.integers(0, 2**32 - 1))
def test_a_text_may_end_exactly_where_it_matches(opened, name, expression, seed):
    tokenizer, constraints = opened[name]
    sampling = Sampling(regex=expression)
    try:
        constraint = constraints.compile(sampling)
    except RequestError as error:
        assert name == "wordpiece", error  # its tokens begin with a space, and few bytes have one
        assert "has no token for what has to come next" in str(error)
        return
    chooser = np.random.default_rng(seed)
    texts, data = tokenizer.text_bytes(tokenizer.vocab_size), b""
    for _ in range(12):
        # A character that is not complete yet matches nothing.
        matches = re.fullmatch(expression, data.decode("utf-8", "surrogateescape")) is not None
        matches = matches and data.decode("utf-8", "ignore").encode() == data
        assert constraint.accepts == matches
        allowed = np.flatnonzero(constraint.limits() == 0)
        assert constraint.complete == (matches and not len(allowed))
        if not len(allowed):
            break
        token = int(chooser.choice(allowed))
        data += texts[token]
        constraint.advance(token)


@pytest.mark.parametrize("name", ["byte-level", "llama", "gemma", "metaspace"])
def test_all_and_only_fitting_tokens_may_come(opened, name):
    # Against the definition: a token fits if the text with it can still become one of the few that match.
    tokenizer, constraints = opened[name]
    words = [" the", "the", "aa", "a ", "é", "xa the"]
    constraint = constraints.compile(Sampling(regex="|".join(words)))
    allowed = set(np.flatnonzero(constraint.limits() == 0).tolist())
    texts = tokenizer.text_bytes(tokenizer.vocab_size)
    wanted = {
        token for token, text in enumerate(texts) if text and any(word.encode().startswith(text) for word in words)
    }
    assert allowed == wanted
    assert len(wanted) >= 5


def test_what_tokens_add_to_a_text_is_what_the_stream_gives(opened):
    for tokenizer, _ in opened.values():
        texts = tokenizer.text_bytes(tokenizer.vocab_size)
        chooser = np.random.default_rng(0)
        for _ in range(100):
            tokens = chooser.integers(0, tokenizer.vocab_size, 12).tolist()
            data = b"".join(texts[token] for token in tokens)
            try:
                wanted = data.decode()
            except UnicodeDecodeError:
                continue  # malformed bytes are replaced, in ways that differ
            stream = TextStream(tokenizer, continues=True)
            assert "".join([*map(stream.push, tokens), stream.flush()]) == wanted


def test_any_json_object(opened):
    tokenizer, _ = opened["byte-level"]
    for seed in range(10):
        logits = random_logits(seed, tokenizer.vocab_size + PADDING, 300)
        logits[:, tokenizer.encode('"', special=False) + tokenizer.encode("}", special=False)] += 6
        _, text, ended = generate(opened["byte-level"], Sampling(temperature=1.0, json=True), logits)
        assert ended == "complete"
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "the" ("a" | WORD)* "é"\nWORD: /[b-d]{2}/',
        'root ::= "the" ("a" | word)* "é"\nword ::= [b-d] [b-d]',
    ],
    ids=["lark", "gbnf"],
)
def test_grammars_in_both_notations(opened, grammar):
    tokenizer, _ = opened["llama"]
    for seed in range(10):
        logits = random_logits(seed, tokenizer.vocab_size + PADDING)
        _, text, ended = generate(opened["llama"], Sampling(temperature=1.0, grammar=grammar), logits)
        assert ended == "complete"
        assert re.fullmatch("the(a|[b-d]{2})*é", text)


def test_a_weak_model_cannot_go_on_with_spaces(opened):
    tokenizer, _ = opened["byte-level"]
    logits = np.zeros((2000, tokenizer.vocab_size + PADDING), np.float32)
    space = tokenizer.encode(" ", special=False)
    logits[:, space] = 50
    logits[:, tokenizer.encode("}", special=False)] = 40
    tokens, text, ended = generate(opened["byte-level"], Sampling(json=True), logits)
    assert (ended, json.loads(text)) == ("complete", {})
    assert 30 < len(tokens) < 60
    # The schema can say otherwise.
    tight = {"type": "object", "x-guidance": {"whitespace_flexible": False}}
    assert generate(opened["byte-level"], Sampling(json_schema=tight), logits)[1] == "{}"


def test_ends_come_only_where_the_text_may_end(opened):
    tokenizer, _ = opened["byte-level"]
    eos, stop = eos_of(tokenizer), tokenizer.encode("b", special=False)[0]
    logits = np.zeros((9, tokenizer.vocab_size + PADDING), np.float32)
    a = tokenizer.encode("a", special=False)[0]
    logits[:, a], logits[:, eos], logits[:, stop] = 1, 3, 2

    def made(**changes):
        return generate(opened["byte-level"], Sampling(regex="[ab]{2,4}", **changes), logits, eos=[eos])

    assert made() == ([stop, stop, eos], "bb", "eos")
    # A stop token is no text, although the expression would take it as such.
    assert made(stop_token_ids=[stop]) == ([a, a, eos], "aa", "eos")
    assert made(stop_token_ids=[stop], banned_tokens=[eos]) == ([a, a, stop], "aa", "stop")
    assert made(min_new_tokens=3) == ([stop, stop, stop, eos], "bbb", "eos")
    # Nothing more can come, so the text is complete, however many tokens were asked for.
    assert made(min_new_tokens=9) == ([stop] * 4, "bbbb", "complete")


def test_bans_and_biases_combine_with_the_constraint(opened):
    tokenizer, _ = opened["byte-level"]
    ids = dict(zip("abc", tokenizer.encode("abc", special=False), strict=True))
    logits = np.zeros((4, tokenizer.vocab_size + PADDING), np.float32)
    sampling = Sampling(regex="[a-c]{4}", banned_tokens=[ids["a"]], logit_bias={ids["c"]: 1.0, ids["a"]: 9.0})
    assert generate(opened["byte-level"], sampling, logits)[1] == "cccc"
    tokens, text, error = generate(opened["byte-level"], Sampling(regex="ba+", banned_tokens=[ids["a"]]), logits)
    assert (tokens, text) == ([ids["b"]], "b")
    assert "banned_tokens, min_new_tokens and the constraint together" in str(error)


def test_forced_tokens_are_part_of_the_text(opened):
    tokenizer, constraints = opened["byte-level"]
    forced = tokenizer.encode('{"na', special=False)
    logits = random_logits(4, tokenizer.vocab_size + PADDING, 300)
    sampling = Sampling(temperature=1.0, json_schema=PERSON, forced_tokens=forced)
    tokens, text, ended = generate(opened["byte-level"], sampling, logits)
    assert ended == "complete"
    assert tokens[: len(forced)] == forced
    jsonschema.validate(json.loads(text), PERSON)
    wrong = [*forced, tokenizer.encode("x", special=False)[0]]
    with pytest.raises(RequestError, match=rf"do not fit json_schema: token {len(forced)} of them, id {wrong[-1]}"):
        constraints.compile(Sampling(json_schema=PERSON, forced_tokens=wrong))


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"json_schema": {"type": "strin"}}, "Sampling.json_schema: Invalid type: strin"),
        ({"json_schema": {"type": "object", "not": {}}}, "Unimplemented keys"),
        ({"json_schema": "5"}, "Sampling.json_schema: "),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": r"a\b"}, "lookarounds not supported"),
        ({"grammar": "start: missing"}, 'unknown name: "missing"'),
        ({"grammar": "root ::= ("}, "Sampling.grammar: "),
        ({"regex": ""}, "allows no text but the empty one"),
        ({"regex": "[^\\x00-\\U0010FFFF]"}, "Sampling.regex"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused_with_the_parsers_words(opened, sampling, words):
    _, constraints = opened["byte-level"]
    with pytest.raises(RequestError) as caught:
        constraints.compile(Sampling(**sampling))
    assert words in str(caught.value)


def test_a_byte_that_no_token_spells_is_an_error_not_another_text(opened):
    # The grammar prescribes "a.bb", and the tokenizer has no b that follows a full stop without a space.
    tokenizer, constraints = opened["wordpiece"]
    ids = [tokenizer._tokenizer.token_to_id(piece) for piece in ("a", ".")]
    constraint = constraints.compile(Sampling(regex=r" a\.bb"))
    for token in ids:
        assert np.flatnonzero(constraint.limits() == 0).tolist() == [token]
        constraint.advance(token)
    assert np.isneginf(constraint.limits()).all()
    assert constraint.error == "the tokenizer has no token for what has to come next"
    state = Row(Sampling(), vocabulary=len(constraint.limits()), seed=0, constraint=constraint)
    logits = np.zeros((1, len(constraint.limits())), np.float32)
    assert choose(logits, [state]).tolist() == [NO_TOKEN]
    assert "the tokenizer has no token for what has to come next" in str(fault(logits[0], state))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    found = {}
    for name in ("llama 2", "mistral", "unigram with bytes", "gpt-2", "bert", "metaspace"):
        {**FAMILIES, **MAKERS}[name]().save(str(folder / f"{name}.json"))
        tokenizer = Tokenizer(folder / f"{name}.json")
        found[name] = tokenizer, constraint_module._Vocabulary(tokenizer, tokenizer.vocab_size)
    return found


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["llama 2", "mistral", "unigram with bytes", "gpt-2", "bert", "metaspace"]), st.data())
def test_prescribed_bytes_become_exactly_these_bytes(made, name, data):
    tokenizer, vocabulary = made[name]
    text = data.draw(
        st.lists(st.sampled_from(["the", " ", "t", "€", "</s>", "<tool>", "{", "\n", "\U0001f600"])).map("".join)
    )
    wanted = ("x" + text).encode()[: data.draw(st.integers(1, 40))]
    tokens = vocabulary(wanted)
    assert b"".join(vocabulary.tokens[token] for token in tokens) == wanted
    assert not set(tokens) & set(vocabulary.special_token_ids)
    canonical = not any(piece in text for piece in ("</s>", "<tool>", "  "))
    if name in ("gpt-2", "llama 2", "mistral") and canonical:
        # As the tokenizer itself goes on from a line break; byte by byte only where a character is cut.
        try:
            own = tokenizer.encode("\n" + wanted.decode(), special=False)
        except UnicodeDecodeError:
            return
        assert own[-len(tokens) :] == tokens or tokenizer.encode(wanted.decode(), special=False) == tokens
    # Bytes that no token has stand behind the vocabulary, and are taken only where the tokens cannot spell the whole.
    texts = {text for text in tokenizer.text_bytes(tokenizer.vocab_size) if text}
    spelt = [True]
    for end in range(1, len(wanted) + 1):
        spelt.append(any(spelt[start] and wanted[start:end] in texts for start in range(end)))
    assert (max(tokens) < tokenizer.vocab_size) == spelt[-1]


def test_prescribed_text_is_spelt_as_the_tokenizer_would(opened):
    for name in ("byte-level", "llama", "gemma"):
        tokenizer, constraints = opened[name]
        the, a = (tokenizer._tokenizer.token_to_id(piece) for piece in ("the", "a"))
        constraint = constraints.compile(Sampling(regex="thea"))
        for token in (the, a):
            assert np.flatnonzero(constraint.limits() == 0).tolist() == [token]
            constraint.advance(token)
        assert constraint.complete


def test_completions_do_not_share_their_place(opened):
    _, constraints = opened["byte-level"]
    first, second = (constraints.compile(Sampling(regex="a+b")) for _ in range(2))
    a, b = np.flatnonzero(first.limits() == 0)[0], None
    first.advance(int(a))
    allowed = np.flatnonzero(first.limits() == 0)
    assert len(allowed) == 2
    b = int(allowed[allowed != a][0])
    first.advance(b)
    assert first.complete
    assert np.flatnonzero(second.limits() == 0).tolist() == [a]
    # A token that may not come breaks its own constraint alone.
    second.advance(b)
    assert second.error
    assert np.isneginf(second.limits()).all()
    assert np.flatnonzero(constraints.compile(Sampling(regex="a+b")).limits() == 0).tolist() == [a]


def test_few_compiled_constraints_are_kept(opened, monkeypatch):
    monkeypatch.setattr(constraint_module, "_KEPT", 3)
    tokenizer, _ = opened["byte-level"]
    constraints = Constraints(tokenizer, tokenizer.vocab_size)
    for number in (1, 2, 3, 1, 4):
        constraints.compile(Sampling(regex=f"a{{{number}}}"))
    assert [source for _, source in constraints._compiled] == ["a{3}", "a{1}", "a{4}"]


def test_threads_share_one_compiler(opened):
    tokenizer, _ = opened["byte-level"]
    constraints = Constraints(tokenizer, tokenizer.vocab_size)
    texts = {}

    def work(number):
        sampling = Sampling(temperature=1.0, regex=f"[a-c]{{{number % 3 + 1},9}}q")
        logits = random_logits(number % 3, tokenizer.vocab_size)
        texts[number] = generate((tokenizer, constraints), sampling, logits)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 12
    assert all(texts[number] == texts[number % 3] for number in texts)
    assert all(ended == "complete" for _, _, ended in texts.values())


def test_without_llguidance_the_extra_is_named(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tokenizer, _ = opened["byte-level"]
    constraints = Constraints(tokenizer, tokenizer.vocab_size)
    assert constraints.compile(Sampling()) is None
    with pytest.raises(RequestError, match=r"pip install 'fmedge\[constraints\]'"):
        constraints.compile(Sampling(regex="a"))


def test_decoders_that_look_across_tokens_are_refused(tmp_path):
    word_level(decoders.CTC(pad_token="e", word_delimiter_token=" ")).save(str(tmp_path / "ctc.json"))
    constraints = Constraints(Tokenizer(tmp_path / "ctc.json"), 20)
    with pytest.raises(RequestError, match=r"the decoder of this tokenizer \(CTC\) makes it from several"):
        constraints.compile(Sampling(regex="a"))

"""The tokenizer, and that text given out token by token is the text of all tokens, cut at the first stop string."""

import json
import random

import pytest
import tokenizers
from fmedge_runtimes.errors import BundleDamagedError, RequestError
from fmedge_runtimes.tokenizer import TextStream, Tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

MARK = "\u2581"  # SentencePiece's space


def byte_level():
    """A BPE over bytes as GPT-2 and Llama 3 have it: every byte, some merges that cross characters, added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelt = {character: number for number, character in enumerate(alphabet)}
    merges = []
    for text in ("th", "the", "Ġt", "Ġth", "Ġthe", "ðŁ", "ðŁĺ", "âĤ", "Ã©", "Ċ", "ĊĊ"):
        if text not in spelt:
            merges.append((text[:-1], text[-1]))
            spelt[text] = len(spelt)
    tokenizer = tokenizers.Tokenizer(models.BPE(spelt, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return add_tokens(tokenizer)


def sentencepiece(decoder=None):
    """A Unigram with byte fallback and the decoder of Llama 2, which drops the first space of a text."""
    pieces = [MARK, MARK + MARK, MARK + "the", "the", "a", "é", "€", "\U0001f600", "\ufffd", "x" + MARK, "<0x", "0A>"]
    vocabulary = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *((p, -2.0) for p in pieces)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return add_tokens(tokenizer)


def word_level(decoder):
    words = ["a", "b", "##c", ".", "'s", " ", MARK, f"{MARK}d", "e", "<0x41>", ""]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return add_tokens(tokenizer)


def add_tokens(tokenizer):
    tokenizer.add_special_tokens(["<s>", "</s>"])
    # One that is spelt in the byte alphabet, and one that is not.
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("né é", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def gemma_decoder():
    return decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])


def late_replace_decoder():
    """Replaces across tokens, so nothing is certain before the end."""
    return decoders.Sequence([decoders.Fuse(), decoders.Replace("a.", "!")])


MAKERS = {
    "byte-level": byte_level,
    "llama": sentencepiece,
    "gemma": lambda: sentencepiece(gemma_decoder()),
    "metaspace": lambda: sentencepiece(decoders.Metaspace()),
    "strip two": lambda: sentencepiece(
        decoders.Sequence(
            [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 2, 0)]
        )
    ),
    "wordpiece": lambda: word_level(decoders.WordPiece()),
    "no decoder": lambda: word_level(None),
    "ctc": lambda: word_level(decoders.CTC(pad_token="e", word_delimiter_token=" ")),
    "bpe suffix": lambda: word_level(decoders.BPEDecoder(suffix="c")),
    "late replace": lambda: word_level(late_replace_decoder()),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for name, make in MAKERS.items():
        path = folder / f"{name}.json"
        make().save(str(path))
        made[name] = Tokenizer(path)
    return made


def stream_text(stream, tokens):
    pieces = [stream.push(token) for token in tokens]
    pieces.append(stream.flush())
    assert stream.text == "".join(pieces)
    return stream.text


def cut(text, stop):
    found = [text.index(one) for one in stop if one in text]
    return text[: min(found)] if found else text


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_pieces_make_up_the_decoded_text(opened, data):
    tokenizer = opened[data.draw(st.sampled_from(list(MAKERS)))]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=25))
    assert stream_text(TextStream(tokenizer), tokens) == tokenizer.decode(tokens)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_invalid_utf8_decodes_as_in_one_go(opened, data):
    # Bytes around which UTF-8 goes wrong: leads, continuations, surrogates (ED A0), overlong (C0, E0 80), too large.
    awkward = [0x41, 0x7F, 0x80, 0x9F, 0xA0, 0xBF, 0xC0, 0xC3, 0xE0, 0xE2, 0xED, 0xEF, 0xF0, 0x90, 0xF4, 0xF5, 0xFF]
    name = data.draw(st.sampled_from(["byte-level", "llama"]))
    tokenizer = opened[name]
    values = data.draw(st.lists(st.sampled_from(awkward), max_size=12))
    if name == "llama":
        tokens = [1 + value for value in values]
    else:
        ids = {byte: number for number, byte in enumerate(BYTES_IN_ALPHABET)}
        tokens = [ids[value] for value in values]
        assert tokenizer.decode(tokens) == bytes(values).decode("utf-8", "replace")
    assert stream_text(TextStream(tokenizer), tokens) == tokenizer.decode(tokens)


BYTES_IN_ALPHABET = [
    ord(character) if ord(character) < 256 else None for character in sorted(pre_tokenizers.ByteLevel.alphabet())
]
# The characters from 256 on stand for the bytes that have no printable one of their own, in ascending order.
_missing = iter(byte for byte in range(256) if byte not in BYTES_IN_ALPHABET)
BYTES_IN_ALPHABET = [next(_missing) if byte is None else byte for byte in BYTES_IN_ALPHABET]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_stop_strings_cut_where_the_first_begins(opened, data):
    tokenizer = opened[data.draw(st.sampled_from(list(MAKERS)))]
    # Few different tokens, so that stop strings taken from a text like it come up, and overlap.
    few = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=4))
    tokens = data.draw(st.lists(st.sampled_from(few), max_size=30))
    text = tokenizer.decode(data.draw(st.lists(st.sampled_from(few), min_size=1, max_size=8)))
    stop = []
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop.append(text[start : start + data.draw(st.integers(1, 6))] or "the")
    stream = TextStream(tokenizer, stop)
    whole = tokenizer.decode(tokens)
    assert stream_text(stream, tokens) == cut(whole, stop)
    assert stream.stopped == any(one in whole for one in stop)
    if stream.stopped:
        assert [stream.push(token) for token in few] == [""] * len(few)


def ids(tokenizer, *pieces):
    vocabulary = tokenizer._tokenizer.get_vocab()
    return [vocabulary[piece] for piece in pieces]


def test_a_character_comes_when_its_last_byte_does(opened):
    tokenizer = opened["byte-level"]
    stream = TextStream(tokenizer)
    pushed = [stream.push(token) for token in ids(tokenizer, "ðŁĺ", "Ģ", "th", "Ã", "©")]
    assert pushed == ["", "\U0001f600", "th", "", "é"]


def test_half_a_character_at_the_end_is_replaced_on_flush(opened):
    tokenizer = opened["byte-level"]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids(tokenizer, "th", "ðŁĺ")] == ["th", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_spaces_of_sentencepiece_come_with_their_token(opened):
    tokenizer = opened["llama"]
    stream = TextStream(tokenizer)
    pushed = [stream.push(token) for token in ids(tokenizer, f"{MARK}the", "a", MARK, MARK, f"{MARK}the")]
    assert pushed == ["the", "a", " ", " ", " the"]


def test_spaces_that_only_the_first_token_may_lose_are_kept(opened):
    # The decoder strips two spaces from the front of what it is given, so a window must not begin with fewer.
    tokenizer = opened["strip two"]
    stream = TextStream(tokenizer)
    pushed = [stream.push(token) for token in ids(tokenizer, "a", MARK, f"{MARK}the", MARK, MARK, "a")]
    assert pushed == ["a", " ", " the", " ", " ", "a"]


def test_a_decoder_that_looks_across_tokens_is_waited_for(opened):
    tokenizer = opened["late replace"]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids(tokenizer, "b", "a", ".")] == ["", "", ""]
    assert stream.flush() == "b!"


def test_byte_tokens_wait_for_the_end_of_their_run(opened):
    tokenizer = opened["llama"]
    stream = TextStream(tokenizer)
    pushed = [stream.push(token) for token in ids(tokenizer, "a", "<0xC3>", "<0xA9>", "<0x0A>", "the")]
    assert pushed == ["a", "", "", "", "é\nthe"]
    # One bad byte spoils the run, which is why it has to be waited for.
    assert stream_text(TextStream(tokenizer), ids(tokenizer, "<0xC3>", "<0xA9>", "<0xFF>")) == "\ufffd" * 3


def test_special_tokens_have_no_text(opened):
    tokenizer = opened["byte-level"]
    stream = TextStream(tokenizer)
    pushed = [stream.push(token) for token in ids(tokenizer, "<s>", "Ã", "</s>", "©", "<tool>", "né é")]
    assert pushed == ["", "", "", "é", "<tool>", "né é"]


def test_text_that_may_begin_a_stop_string_is_held(opened):
    tokenizer = opened["byte-level"]
    stream = TextStream(tokenizer, ["the end", "theme"])
    tokens = ids(tokenizer, "a", "the", "m", "a", "Ġthe", "Ġ", "e", "n")
    assert [stream.push(token) for token in tokens] == ["a", "", "", "thema", " ", "", "", ""]
    assert not stream.stopped
    assert stream.push(ids(tokenizer, "d")[0]) == ""
    assert stream.stopped
    assert stream.push(ids(tokenizer, "a")[0]) == ""
    assert stream.flush() == ""
    assert stream.text == "athema "


def test_held_text_is_given_out_at_the_end(opened):
    tokenizer = opened["byte-level"]
    stream = TextStream(tokenizer, ["the end"])
    assert [stream.push(token) for token in ids(tokenizer, "the", "Ġ")] == ["", ""]
    assert stream.flush() == "the "
    assert not stream.stopped


def test_an_earlier_unfinished_stop_string_goes_first(opened):
    tokenizer = opened["byte-level"]
    tokens = ids(tokenizer, "a", "b", "c", "d")
    stream = TextStream(tokenizer, ["abcd", "c"])
    assert [stream.push(token) for token in tokens] == ["", "", "", ""]
    assert stream.stopped
    assert stream.text == ""
    stream = TextStream(tokenizer, ["abcd", "c"])
    assert stream_text(stream, tokens[:3]) == "ab"
    assert stream.stopped


def test_stop_strings_are_no_patterns(opened):
    tokenizer = opened["byte-level"]
    assert stream_text(TextStream(tokenizer, [".", "a+"]), ids(tokenizer, "a", "a", "+", "b")) == "a"


def test_work_per_token_does_not_grow(opened, monkeypatch):
    # Counts the tokens that are decoded: a constant number for each one pushed, even in degenerate loops.
    chooser = random.Random(1)
    for name in ("llama", "wordpiece"):
        tokenizer = opened[name]
        decoded = 0

        class Counting:
            def __init__(self, real):
                self.id_to_token = real.id_to_token
                self.real = real

            def decode(self, tokens, skip_special_tokens):
                nonlocal decoded
                decoded += len(tokens)
                return self.real.decode(tokens, skip_special_tokens=skip_special_tokens)

        monkeypatch.setattr(tokenizer, "_tokenizer", Counting(tokenizer._tokenizer))
        loops = [[chooser.randrange(tokenizer.vocab_size) for _ in range(2000)]]
        if name == "llama":
            spaces = tokenizer._tokenizer.real.token_to_id(MARK)
            loops += [[spaces] * 2000, [1 + 0xFF] * 2000, [tokenizer._tokenizer.real.token_to_id("a"), spaces] * 1000]
        for tokens in loops:
            decoded = 0
            stream_text(TextStream(tokenizer), tokens)
            assert decoded < 10 * len(tokens)


def test_encode_adds_special_tokens_unless_told_not_to(opened):
    tokenizer = opened["byte-level"]
    bos, the = ids(tokenizer, "<s>", "the")
    assert tokenizer.encode("the") == [bos, the]
    assert tokenizer.encode("the", special=False) == [the]
    assert tokenizer.encode("<s>the", special=False) == [bos, the]


@settings(max_examples=100, deadline=None)
@given(st.text())
@example("naïve \U0001f600\n\n the")
def test_text_survives_the_round_trip(opened, text):
    tokenizer = opened["byte-level"]
    tokens = tokenizer.encode(text)
    wanted = text.replace("<s>", "").replace("</s>", "")
    assert tokenizer.decode(tokens) == wanted
    assert stream_text(TextStream(tokenizer), tokens) == wanted


def test_truncation_and_padding_of_training_are_ignored(tmp_path):
    made = byte_level()
    made.enable_truncation(4)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path / "tokenizer.json").encode("a" * 20)) == 21
    assert len(Tokenizer(tmp_path / "tokenizer.json").encode("a")) == 2


def test_vocab_size_is_above_all_ids(tmp_path, opened):
    assert opened["llama"].vocab_size == opened["llama"]._tokenizer.get_vocab_size()
    # Ids may have gaps.
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 7}, "a")).save(str(tmp_path / "gap.json"))
    assert Tokenizer(tmp_path / "gap.json").vocab_size == 8


def test_ids_that_pad_the_logits_have_no_text(opened):
    tokenizer = opened["byte-level"]
    the = ids(tokenizer, "the")[0]
    tokens = [the, tokenizer.vocab_size, 150_000, the]
    assert tokenizer.decode(tokens) == "thethe"
    assert stream_text(TextStream(tokenizer), tokens) == "thethe"


@pytest.mark.parametrize("token", [-1, 2**32])
def test_what_cannot_be_an_id_is_refused(opened, token):
    with pytest.raises(RequestError, match=f"{token} is not a token id"):
        opened["llama"].decode([5, token])
    with pytest.raises(RequestError, match=f"{token} is not a token id"):
        TextStream(opened["llama"]).push(token)


def test_text_that_is_not_unicode_is_refused(opened):
    with pytest.raises(RequestError, match="valid Unicode"):
        opened["llama"].encode("a lone surrogate: \ud800")


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"\xff\xfe", b'{"model": 1}', json.dumps({"version": "1.0"}).encode()]
)
def test_a_file_that_is_no_tokenizer_is_damage(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleDamagedError, match=r"tokenizer\.json cannot be read as a tokenizer .*again"):
        Tokenizer(path)

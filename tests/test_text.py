"""The published SentencePiece rules on a small file, and the mini's own Unigram model."""

import struct
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqaa.tokenizers import text as module
from aqaa.tokenizers.text import FIRST_TEXT, MANNERS, MAX_PIECE, ROLES, SPACE, TextTokenizer, tagged

SENTENCES = ["seven and five is twelve", "don't say the opposite of hot", "what is a zebra", "jump quick over my box"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def mini():
    return TextTokenizer.train(SENTENCES * 20, n_text=160)


def varint(number):
    head, rest = number & 127, number >> 7
    return bytes([head | 128]) + varint(rest) if rest else bytes([head])


def field(number, value):
    """One protobuf field: int, float, str or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(model_type=1):
    """A model file with every type of piece that Step-1's has."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<|EOT|>", 0.0, 3), ("<|BOT|>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(SPACE, -3.0, 1), (SPACE + "hum", -4.0, 1), ("an", -4.0, 1), ("hum", -6.0, 1), ("\n", -5.0, 1)]
    pieces += [(letter, -8.0, 1) for letter in LETTERS] + [("<audio_0>", 0.0, 4), ("<audio_1>", 0.0, 4)]
    body = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + (b"" if kind == 1 else field(3, kind)))
        for text, score, kind in pieces
    )
    return pieces, body + field(2, field(3, model_type) + field(35, 1)) + field(3, field(3, 1))


@pytest.fixture(scope="module")
def step1(tmp_path_factory):
    path = tmp_path_factory.mktemp("step1") / "tokenizer.model"
    path.write_bytes(sentencepiece_model()[1])
    return TextTokenizer.from_sentencepiece(path)


def test_reader_sees_every_piece():
    pieces, data = sentencepiece_model()
    assert module.read_sentencepiece(data) == (pieces, 1)


def test_sentencepiece_rules(step1):
    name = step1.tokenizer.id_to_token
    pieces = lambda text, **options: [name(i) for i in step1.encode(text, **options)]  # noqa: E731
    assert pieces("human\n") == [SPACE + "hum", "an", "\n"]
    assert pieces("human\n", prefix=False) == ["hum", "an", "\n"]
    assert pieces("<|BOT|>human\n<audio_1><|EOT|>", bos=True)[:3] == ["<s>", "<|BOT|>", "hum"]
    assert pieces("<audio_1><audio_0>") == ["<audio_1>", "<audio_0>"]
    assert pieces("é", prefix=False) == ["<0xC3>", "<0xA9>"]
    assert step1.encode("") == []
    assert "<|EOT|>" not in pieces("a<|EOT|>b", specials=False)
    assert "<audio_1>" in pieces("a<|EOT|><audio_1>", specials=False)


@given(text=st.text(alphabet=LETTERS + " \né你👍<|>", max_size=20))
def test_byte_fallback_loses_nothing(step1, text):
    assert step1.decode(step1.encode("x" + text, specials=False), skip_specials=False) == "x" + text
    assert not {1, 2, 3, 4} & set(step1.encode(text, specials=False))


def test_saved_and_read_again(step1, mini, tmp_path):
    for tokenizer, text in ((step1, "human <|EOT|>é"), (mini, "seven and five")):
        tokenizer.save(tmp_path / "tokenizer.json")
        again = TextTokenizer.from_file(tmp_path / "tokenizer.json")
        assert again.encode(text) == tokenizer.encode(text) and again.n_text == tokenizer.n_text
        assert again.encode(text, specials=False) == tokenizer.encode(text, specials=False)


@pytest.mark.parametrize("content, read, words", [
    (b"\x0a\xffnot a model", TextTokenizer.from_sentencepiece, "not a SentencePiece model"),
    (b"\x0a\xffnot a model", TextTokenizer.from_file, "not a tokenizer.json"),
    (b"", TextTokenizer.from_sentencepiece, "holds no pieces"),
    (field(1, field(1, b"a" * 1001)), TextTokenizer.from_sentencepiece, "not a SentencePiece model"),
    (field(1, field(1, 10**9)), TextTokenizer.from_sentencepiece, "not a SentencePiece model"),
    (field(1, field(1, b"a") + field(2, float("nan"))), TextTokenizer.from_sentencepiece, "not a SentencePiece model"),
    (sentencepiece_model(model_type=2)[1], TextTokenizer.from_sentencepiece, "only Unigram"),
])  # fmt: skip
def test_faults_are_named(tmp_path, content, read, words):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        read(tmp_path / "model")
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "model")


def test_the_letters_need_room():
    with pytest.raises(ValueError, match="at least 96"):
        TextTokenizer.train(SENTENCES, n_text=90)


@given(words=st.lists(st.text(LETTERS + "'", min_size=1, max_size=8), min_size=1, max_size=6))
def test_the_mini_reads_any_lower_case_text(mini, words):
    text = " ".join(words)
    tokens = mini.encode(text)
    assert mini.decode(tokens) == text and all(FIRST_TEXT <= t < mini.n_text for t in tokens)
    assert mini.encode(text, prefix=False) == tokens  # a word has one spelling, wherever it stands


def test_the_mini_keeps_step1_ids_and_is_reproducible(mini):
    assert mini.n_text == 160
    assert [mini.encode(role) for role in ROLES] == [[39], [40], [41]]
    assert [mini.encode(tagged("", manner).strip()) for manner in MANNERS] == [[42 + i] for i in range(10)]
    assert mini.decode(mini.encode(tagged("we walk", "slow"))) == "(slow) we walk" and tagged("we", "normal") == "we"
    assert mini.encode("<|EOT|><|BOT|>") == [3, 4] and mini.encode("<text_end>") == [34]
    again = TextTokenizer.train(SENTENCES * 20, n_text=160)
    assert again.tokenizer.to_str() == mini.tokenizer.to_str()
    assert mini.decode(mini.encode("Café — don’t")) == "cafe don't"
    assert len(" ".join(SENTENCES)) / len(mini.encode(" ".join(SENTENCES))) > 1.5


def test_unigram_prefers_frequent_pieces():
    words = Counter({SPACE + "the": 100, SPACE + "then": 50, SPACE + "cat": 1})
    pieces = dict(module.train_unigram(words, 40, [SPACE, *LETTERS]))
    assert SPACE + "the" in pieces and pieces[SPACE + "the"] > pieces.get(SPACE + "cat", -99)
    assert all(len(piece) <= MAX_PIECE for piece in pieces) and len(pieces) <= 40

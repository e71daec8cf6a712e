"""SentencePiece models read without its library, against its library."""

import random
import struct
from functools import cache

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pangu_folder import HAN, MARKS, WORDS, train
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from osum_npu.models.sentencepiece import convert, read_model

CONTROL = ["<s>", "</s>", "<unk>"]
STRANGE = ["😀", "👩\u200d👧", "❤️", "🇨🇳", "龘", "é", "ﬁ", "Ａｂ", "①", "㎏", "Ñ", "\u3000", "\u00a0", "\u2028"]
SIGNS = ["\t", "\n", "\r", "\r\n", "\x00", "\x01", "\x1f", "\x7f", "\u200b", "\ufeff"]
LOOKALIKES = ["<0x41>", "<0xE4>", "▁", "<|im_end|>", "[unused", "unused3]", "[unused99]", "［unused3］", "[[unused1]]"]
RANGES = [(0x20, 0x7E), (0xA1, 0x2FF), (0x3041, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F6FF), (0x20000, 0x2A6DF)]


def texts(count, seed=0):
    """Random strings of everything that there is; the same for the same seed."""
    draw = random.Random(seed)
    kinds = [
        lambda: draw.choice(WORDS),
        lambda: "".join(draw.choices(HAN, k=draw.randint(1, 6))),
        lambda: " " * draw.randint(1, 3),
        lambda: draw.choice(MARKS),
        lambda: draw.choice(STRANGE + SIGNS),
        lambda: draw.choice(LOOKALIKES + CONTROL),
        lambda: chr(draw.randint(*draw.choice(RANGES))),
        lambda: "".join(draw.choices("ab <>[]unsed0123", k=draw.randint(1, 6))),
    ]
    return ["".join(draw.choice(kinds)() for _ in range(draw.randint(0, 9))) for _ in range(count)]


MODELS = {
    "usual": {},
    "rules": {"normalization_rule_name": "nmt_nfkc"},
    "rules, all spaces": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False},
    "all spaces": {"remove_extra_whitespaces": False},
    "no prefix": {"add_dummy_prefix": False},
    "bare": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "no bytes": {"byte_fallback": False},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Model files by algorithm and form, made when they are asked for."""
    made = {}

    def find(kind, form):
        if (kind, form) not in made:
            made[kind, form] = tmp_path_factory.mktemp("model") / "tokenizer.model"
            made[kind, form].write_bytes(train(kind, **MODELS[form]))
        return made[kind, form]

    return find


@cache
def fast(path):
    return PreTrainedTokenizerFast(tokenizer_object=convert(read_model(path)))


def library(path, *, marks=True):
    """The library itself; without marks, its model takes them for plain text."""
    message = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for piece in message.pieces:
        if not marks and piece.type == piece.USER_DEFINED:
            piece.type = piece.CONTROL
    return sentencepiece.SentencePieceProcessor(model_proto=message.SerializeToString())


def ids(tokenizer, texts, **options):
    return tokenizer(texts, add_special_tokens=False, **options).input_ids


def differences(pairs, their):
    """Pairs that differ, but for two ways that are equally good in float32, in which the library adds up scores."""
    found = []
    for text, (got, want) in pairs.items():
        one, other = (sum(map(their.get_score, way)) for way in (got, want))
        if got != want and not (len(got) == len(want) and abs(one - other) < 1e-4):
            found.append((text, [their.id_to_piece(i) for i in got], [their.id_to_piece(i) for i in want]))
    return found


CASES = [
    (kind, form, 12_000 if form in ("usual", "rules") else 1_500) for kind in ("bpe", "unigram") for form in MODELS
]


@pytest.mark.parametrize(("kind", "form", "count"), CASES)
def test_ids_and_texts_of_the_library(kind, form, count, files):
    tokenizer, their = fast(files(kind, form)), library(files(kind, form))
    marked, written = tokenizer._tokenizer.normalizer, texts(count)
    written = [text for text in written if not any(mark in text for mark in CONTROL)]
    prefixed = MODELS[form].get("add_dummy_prefix", True)
    asked = [text for text in written if not (prefixed and marked.normalize_str(text) in MARKS)]
    assert len(asked) > (10_000 if count == 12_000 else 0.8 * count)
    want = their.encode(asked)
    pairs = dict(zip(asked, zip(ids(tokenizer, asked), want)))
    assert differences(pairs, their) == []
    ties = sum(got != want for got, want in pairs.values())
    assert ties == 0 if kind == "bpe" else ties <= count // 500
    assert tokenizer.batch_decode(want) == their.decode(want)
    assert {len(text) for text in asked} > set(range(40)), "the texts are too short to tell anything"


@pytest.mark.parametrize("form", ["usual", "rules", "bare"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_special_pieces_are_plain_text_where_they_are_split(kind, form, files):
    tokenizer, their = fast(files(kind, form)), library(files(kind, form), marks=False)
    special = set(tokenizer.added_tokens_decoder)
    assert len(special) == len(MARKS + CONTROL)
    written = [text for text in texts(4000, 1) if tokenizer._tokenizer.normalizer.normalize_str(text) not in MARKS]
    assert sum(any(mark in text for mark in CONTROL + MARKS) for text in written) > 1500
    got, want = ids(tokenizer, written, split_special_tokens=True), their.encode(written)
    assert differences(dict(zip(written, zip(got, want))), their) == []
    assert not any(special & set(row) for row in ids(tokenizer, MARKS + CONTROL, split_special_tokens=True))


def test_marks_and_names_of_control_are_one_unit(files):
    tokenizer = fast(files("bpe", "usual"))
    assert ids(tokenizer, ["hi<s>", "hi[unused3]今[unused4]"]) == [
        [*ids(tokenizer, "hi"), 1],
        [*ids(tokenizer, "hi"), 6, tokenizer.convert_tokens_to_ids("今"), 7],
    ]
    assert tokenizer.decode(ids(tokenizer, "hi[unused3]"), skip_special_tokens=True) == "hi"
    assert ids(tokenizer, "[unused3]") == [6]  # where the library writes a space in front
    assert library(files("bpe", "usual")).encode("[unused3]")[1:] == [6]


@pytest.mark.parametrize("form", ["usual", "rules"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_saved_and_loaded_it_is_the_same(kind, form, files, tmp_path):
    tokenizer = fast(files(kind, form))
    tokenizer.save_pretrained(tmp_path)
    again, written = AutoTokenizer.from_pretrained(tmp_path), texts(2000, 2)
    for split in (False, True):
        rows = ids(tokenizer, written, split_special_tokens=split)
        assert ids(again, written, split_special_tokens=split) == rows
        assert again.batch_decode(rows) == tokenizer.batch_decode(rows)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=30))
def test_any_text_comes_back(files, text):
    """Bytes, no rules and all spaces kept: nothing is lost but the unit's own sign for a space."""
    tokenizer = fast(files("bpe", "all spaces"))
    rows = ids(tokenizer, text, split_special_tokens=True)
    assert tokenizer.decode(rows) == text.replace("▁", " ")


# -- what is wrong with a file


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.binary(max_size=3))
@example(place=10665, noise=b"\x00")
def test_a_file_that_is_damaged_is_named_or_read(files, tmp_path_factory, place, noise):
    """What is read of a file that ends too early is what was there, but for the piece where it ends."""
    whole = files("bpe", "usual")
    content, pieces = whole.read_bytes(), read_model(whole).pieces
    place %= len(content)
    path = tmp_path_factory.mktemp("damaged") / "tokenizer.model"
    path.write_bytes(content[:place] + noise)
    try:
        *found, _ = read_model(path).pieces
        said = str(path)
    except ValueError as error:
        found, said = [], str(error)
    assert str(path) in said
    assert found == pieces[: len(found)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", r"no SentencePiece model.*git-lfs"),
        (b"", "it has no pieces"),
        (None, "no SentencePiece model that can be read: FileNotFoundError"),
    ],
)
def test_a_file_of_something_else_is_named(content, complaint, tmp_path):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.model.*{complaint}"):
        read_model(path)


@pytest.mark.parametrize(
    ("kind", "options", "complaint"),
    [
        ("char", {}, "splits by words or characters"),
        ("bpe", {"treat_whitespace_as_suffix": True}, "spaces behind words"),
    ],
)
def test_what_is_not_known_is_refused(kind, options, complaint, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(kind, **options))
    with pytest.raises(ValueError, match=complaint):
        read_model(path)


def test_a_mark_that_its_own_rules_change_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    message = sentencepiece_model_pb2.ModelProto.FromString(train("bpe", normalization_rule_name="nmt_nfkc"))
    message.pieces[5].piece = "［unused］"
    path.write_bytes(message.SerializeToString())
    with pytest.raises(ValueError, match="'［unused］' is changed by the normalising rules"):
        convert(read_model(path))


def test_merges_follow_the_scores_in_any_vocabulary(tmp_path):
    """Pieces of a and b alone, so that everything overlaps, with scores that no training would give."""
    message = sentencepiece_model_pb2.ModelProto.FromString(train("bpe", add_dummy_prefix=False))
    del message.pieces[3 + len(MARKS) + 256 :]
    draw = random.Random(0)
    for number in range(60):
        pieces = ["a", "b"]
        while len(pieces) < 10:
            text = draw.choice(pieces) + draw.choice(pieces)
            pieces += [] if text in pieces else [text]
        draw.shuffle(pieces)
        changed = sentencepiece_model_pb2.ModelProto.FromString(message.SerializeToString())
        for score, text in enumerate(pieces):
            changed.pieces.add(piece=text, score=-score)
        path = tmp_path / f"{number}.model"
        path.write_bytes(changed.SerializeToString())
        written = ["".join(draw.choices("ab", k=draw.randint(1, 16))) for _ in range(60)]
        assert ids(fast(path), written) == library(path).encode(written), pieces


def test_scores_are_read_as_they_stand(files):
    model, their = read_model(files("unigram", "usual")), library(files("unigram", "usual"))
    assert [piece.text for piece in model.pieces] == [their.id_to_piece(i) for i in range(len(their))]
    scores = [struct.pack("<f", piece.score) for piece in model.pieces]
    assert scores == [struct.pack("<f", their.get_score(i)) for i in range(len(their))]

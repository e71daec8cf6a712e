"""What users write reaches the model as text: no tokenizer takes a part of it for a special token or a mark."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from osum_npu.models.tokenizer import train_tokenizer
from osum_npu.tasks import CHAT_SEPARATOR, prompts
from osum_npu.tasks.plain_text import encode_plain

TEXTS = [wording for wordings in prompts().values() for wording in wordings]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "[unused10]", "<<s>>"]
MARKS = ["<male>", "<asr>", "<0.42>", CHAT_SEPARATOR, "<tool_call>", "  "]


def byte_level():
    """As Qwen's tokenizer: bytes, special tokens, marks that are not special, a normaliser."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return with_marks(tokenizer)


def unigram():
    """As a SentencePiece model whose pieces hold the marks themselves: ``[unused10]`` could be a likely word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False,
        initial_alphabet=[chr(i) for i in range(33, 127)],
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    return with_marks(tokenizer)


def with_marks(tokenizer):
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in SPECIAL])
    tokenizer.add_tokens([AddedToken(mark, normalized=mark != "<male>", special=False) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )


OURS = train_tokenizer(TEXTS, [mark for mark in MARKS if mark.strip()], 500)
TOKENIZERS = {"byte level": byte_level(), "unigram": unigram(), "ours": OURS}
PIECES = st.sampled_from(
    [
        *SPECIAL,
        *MARKS,
        "<|endoftext|>",
        "<|im_<|im_end|>end|>",
        "＜s＞",
        "<0x41>",
        "<age>",
        "tell me",
        "年龄",
        " ",
        "a",
        "<",
    ]
)
SAID = st.lists(PIECES | st.text(max_size=3), max_size=8).map("".join)


def reserved(tokenizer):
    return {i for i, mark in tokenizer.added_tokens_decoder.items() if str(mark).strip()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(said=SAID)
def test_no_text_of_a_user_is_a_token_that_steers_the_model(name, said):
    tokenizer = TOKENIZERS[name]
    (ids,) = encode_plain(tokenizer, [said])
    assert reserved(tokenizer).isdisjoint(ids)
    if name == "byte level":  # loses nothing but what its normaliser changes
        text = tokenizer.backend_tokenizer.normalizer.normalize_str(said)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_alone_would_take_them_for_its_own(name):
    tokenizer = TOKENIZERS[name]
    mark = tokenizer.eos_token
    for text in (mark, "<male>"):
        said = f"tell me {text} the age"
        assert not reserved(tokenizer).isdisjoint(tokenizer(said, add_special_tokens=False).input_ids)
        (ids,) = encode_plain(tokenizer, [said])
        assert "".join(tokenizer.decode(ids, skip_special_tokens=True).split()) in (
            "".join(said.split()), "".join(said.split()).replace("<", "").replace(">", ""),
        )  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_without_marks_has_the_ids_that_it_always_had(name):
    tokenizer = TOKENIZERS[name]
    assert encode_plain(tokenizer, TEXTS) == tokenizer(TEXTS, add_special_tokens=False).input_ids
    assert encode_plain(tokenizer, []) == []
    assert encode_plain(tokenizer, [""]) == [[]]


def test_ten_thousand_letters_of_marks_are_cut_in_time():
    (ids,) = encode_plain(OURS, ["<male>" * 2000])
    assert reserved(OURS).isdisjoint(ids)

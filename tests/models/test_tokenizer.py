import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from osum_npu.models.tokenizer import END, load_tokenizer, train_tokenizer
from osum_npu.tasks import CHAT_SEPARATOR, normalize_text, prompts

TEXTS = ["hello world how are you", "don't stop, it's 12 o'clock", "今天天气很好", "世界", "用 python 写 code"] * 3
TEXTS += [wording for wordings in prompts().values() for wording in wordings]
MARKS = ["<male>", "<throat clearing>", "<新闻科普>", CHAT_SEPARATOR, *(f"<{i / 50:.2f}>" for i in range(60))]
TOKENIZER = train_tokenizer(TEXTS, MARKS, 600)

# Text as people write it and as nobody does: words, Han, marks and their fragments, emoji, whatever Unicode holds.
pieces = st.one_of(
    st.sampled_from(["hello", "world", "don't", "天气", "世", "，", "。", " ", "  ", "12", "<", ">", "<male", "0.42>"]),
    st.sampled_from(MARKS),
    st.sampled_from(["😀", "👩\u200d👧", "é", "e\u0301", "ß", "ёлка", "日本語", "한국", "\t", "\n", "\u3000", "𠀀"]),
    st.sampled_from(["<0x41>", "▁", "##ing", "Ġ"]),
    st.text(max_size=5),
)
texts = st.lists(pieces, max_size=12).map("".join).filter(lambda text: END not in text)


def ids(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False).input_ids


def plain(text):
    """What must survive; the units' own sign for a space is a space."""
    return normalize_text(text.replace("▁", " ")).strip()


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=400)
@given(texts)
def test_any_text_comes_back(text):
    assert plain(TOKENIZER.decode(ids(text), skip_special_tokens=True)) == plain(text)


@settings(deadline=None, max_examples=100)
@given(text=texts)
def test_saved_and_loaded_it_is_the_same(reloaded, text):
    assert ids(text, reloaded) == ids(text)
    assert reloaded.decode(ids(text), skip_special_tokens=True) == TOKENIZER.decode(ids(text), skip_special_tokens=True)
    assert len(reloaded) == len(TOKENIZER)
    assert reloaded.eos_token_id == reloaded.pad_token_id == TOKENIZER.eos_token_id


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_is_one_unit_wherever_it_stands(mark):
    (unit,) = ids(mark)
    for text in (f"hello{mark}", f"{mark}hello", f"天气{mark}很好", f"{mark}{mark}", f"a {mark} b"):
        assert ids(text).count(unit) == text.count(mark)
    assert TOKENIZER.decode(ids(f"hello{mark}"), skip_special_tokens=True) == f"hello{mark}"


@pytest.mark.parametrize("word", ["hello", "world", "stop", "天", "好"])
def test_a_word_is_one_unit_wherever_it_stands(word):
    (unit,) = ids(word)
    for text in ("{} you", "you {}", "<male>{}", "<0.42>{}<0.58>", "今{}今", "you {}, you"):
        assert unit in ids(text.format(word)), text


def test_ids_fill_the_vocabulary_without_gaps():
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(len(TOKENIZER)))
    assert ids(END) == [TOKENIZER.eos_token_id]
    assert TOKENIZER.all_special_tokens == [END]


def test_learning_is_reproducible():
    again = train_tokenizer(iter(TEXTS), MARKS, 600)
    assert again.get_vocab() == TOKENIZER.get_vocab()


def test_an_llm_s_family_does_not_change_its_tokenizer(tmp_path):
    AutoConfig.for_model("qwen2").save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    text = "hello world, don't 今天天气<male>"
    assert ids(text, load_tokenizer(str(tmp_path))) == ids(text)

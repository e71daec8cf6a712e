"""Forms: the fixed texts byte for byte, and the one rule of what begins with ``<s>``."""

from types import SimpleNamespace
from typing import get_args

import pytest
import recorded
from hypothesis import given
from hypothesis import strategies as st
from replay import Tokenizer

from osum_npu.models.speech_llm import SpeechLLMConfig
from osum_npu.tasks.form import BeginOfText, FormName, get_form
from osum_npu.tasks.task import Kind

TEMPLATES = recorded.read("osum_pangu.json")["templates"]
KINDS = get_args(Kind)
TRAINED = {
    "text": "train.text",
    "chat": "train.s2t_chat",
    "chat_think": "train.s2t_chat_think",
    "text2text": "train.text2text",
    "intent": "train.intent_classification",
}
RELEASED = {
    "text": "released.generate",
    "chat": "released.generate4chat",
    "chat_think": "train.s2t_chat_think",
    "text2text": "released.generate_text2text",
    "intent": "released.generate_text2text",
}


@pytest.mark.parametrize(("name", "keys"), [("osum_pangu", TRAINED), ("osum_pangu_released", RELEASED)])
def test_the_texts_are_the_original_s_to_the_byte(name, keys):
    form = get_form(name)
    assert dict(form.before) == {kind: TEMPLATES[key] for kind, key in keys.items()}
    assert form.after == TEMPLATES["assistant"]
    assert set(form.texts) == {form.after, *form.before.values()}
    assert form.prefix
    assert form.prompt == {"text", "text2text", "intent"}


def test_osum_s_form_is_the_instruction_alone():
    form = get_form("osum")
    assert form.texts == []
    assert not form.prefix
    tokenizer = Tokenizer()
    asked = form.encode(tokenizer, KINDS, ["say it"] * len(KINDS))
    assert asked == [([*b"say it"], [])] * len(KINDS)
    assert form.encode(tokenizer, [], []) == []


def encode(text):
    """With marks, as the fixed texts are."""
    return Tokenizer()([text], add_special_tokens=False).input_ids[0]


@given(
    st.sampled_from(get_args(FormName)),
    st.sampled_from(get_args(BeginOfText)),
    st.lists(st.tuples(st.sampled_from(KINDS), st.text("ab好", max_size=3)), max_size=4),
)
def test_each_text_is_tokenized_by_itself_and_begins_as_the_rule_says(name, rule, questions):
    form, mark = get_form(name, rule), [Tokenizer.bos_token_id]
    asked = form.encode(Tokenizer(), [kind for kind, _ in questions], [text for _, text in questions])

    def begun(text, *, own):
        begins = rule == "all" or (rule == "fixed" and not own)
        return [*(mark if begins else []), *encode(text)] if text else []

    assert asked == [
        (
            begun(form.before[kind], own=False) + begun(text if kind in form.prompt else "", own=True),
            begun(form.after, own=False),
        )
        for kind, text in questions
    ]


def test_a_model_directory_names_form_and_rule(tmp_path):
    config = SpeechLLMConfig(form="osum_pangu", begin_of_text="fixed")
    config.save_pretrained(tmp_path)
    found = SpeechLLMConfig.from_pretrained(tmp_path)
    assert (found.form, found.begin_of_text) == ("osum_pangu", "fixed")
    old = SpeechLLMConfig()
    assert (old.form, old.begin_of_text) == ("osum", "none")


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="there is no form 'pangu'; there are osum, osum_pangu, osum_pangu_released"):
        get_form("pangu")
    with pytest.raises(ValueError, match="there is no begin_of_text 'some'; there are none, fixed, all"):
        get_form("osum", "some")
    tokenizer = SimpleNamespace(bos_token_id=None)
    with pytest.raises(ValueError, match="begin_of_text is 'all', and the tokenizer has no mark"):
        get_form("osum_pangu", "all").encode(tokenizer, [], [])

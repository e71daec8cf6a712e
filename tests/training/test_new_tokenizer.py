"""The tokenizer that a recipe's new LLM learns from its data."""

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.config import load_recipe
from osum_npu.data.sources import read_source
from osum_npu.tasks.form import get_form
from osum_npu.training.build import build

KINDS = ("text", "chat", "chat_think", "text2text", "intent")
FORM = get_form("osum_pangu")
ASKED = "tell me how old they are"


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    layer = tiny.write_recipe(tmp_path_factory.mktemp("new_tokenizer") / "recipe.yaml", corpus)
    recipe = load_recipe([layer], ["out=nowhere", "model.form=osum_pangu"])
    return build(recipe, read_source(corpus / "train.jsonl", 3.0)[0])[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_text_is_one_unit_and_stays_the_same_text(tokenizer, kind):
    (asked,) = FORM.encode(tokenizer, [kind], [ASKED])
    (bare,) = FORM.encode(tokenizer, [kind], [""])
    assert len(bare.before) == len(bare.after) == 1
    assert tokenizer.decode(bare.before) == FORM.before[kind]
    assert tokenizer.decode(bare.after) == FORM.after
    assert asked.before[:1] == bare.before
    assert (len(asked.before) > 1) == (kind in FORM.prompt)


@given(st.sampled_from(FORM.texts), st.text(max_size=9), st.text(max_size=9))
def test_a_user_who_writes_a_fixed_text_writes_letters(tokenizer, text, head, tail):
    (question,) = FORM.encode(tokenizer, ["text"], [head + text + tail])
    fixed = set(tokenizer.convert_tokens_to_ids(FORM.texts))
    assert fixed.isdisjoint(question.before[1:])

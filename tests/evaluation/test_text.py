import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.evaluation.text import is_chinese, release_tokens, tokens


@pytest.mark.parametrize(
    ("one", "other", "lang"),
    [
        ("Mr. Smith's colour, twenty-one!", "mister smith is color 21", "en"),
        ("I can't, um, go", "i can not go", "en-US"),
        ("it's 50% off <happy>", "It is 50% off", "en"),
        ("今天，天气好。", "今天 天气 好", "zh"),
        ("ＡＢＣ１２３", "abc123", "zh"),
        ("It’s 好", "it's好", "zh-CN"),
        ("你好<male>", "你好", None),
    ],
)
def test_what_is_no_error_to_differ_in(one, other, lang):
    assert tokens(one, lang) == tokens(other, lang) != []


def test_units_are_han_characters_and_words():
    assert tokens("我用 Qwen2 和wi-fi，花了3.5元", "zh") == [*"我用", "qwen2", "和", "wi", "fi", *"花了", "3.5", "元"]
    assert tokens("say 你好 twice", "en") == ["say", "你", "好", "twice"]


def test_other_languages_keep_their_words():
    assert tokens("Schöne Grüße, colour!", "de") == ["schöne", "grüße", "colour"]


@given(st.text(max_size=40), st.sampled_from(["en", "zh", None]))
def test_units_have_no_space_and_are_never_empty(text, lang):
    assert all(unit and not any(c.isspace() for c in unit) for unit in tokens(text, lang))


@given(st.text(max_size=40))
def test_normalising_chinese_twice_changes_nothing(text):
    once = tokens(text, "zh")
    assert tokens(" ".join(once), "zh") == once


def test_the_release_scorer_drops_punctuation_only_where_a_unit_begins():
    assert release_tokens("hello, world ! 你好！") == ["HELLO,", "WORLD", "你", "好"]
    assert release_tokens("<unk>yes<adult> 我<") == ["YES", "我"]


def test_languages_scored_in_characters():
    assert all(map(is_chinese, ["zh", "zh-CN", "zh_Hans", "ZH", "yue"]))
    assert not any(map(is_chinese, ["en", "en-GB", "de", "ja"]))


def test_only_english_waits_for_whisper():
    code = "import sys; from osum_npu.evaluation import tokens; tokens('你好', 'zh'); print('whisper' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

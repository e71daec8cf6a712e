import pytest
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.evaluation.timestamps import TimeShift, time_shift
from osum_npu.tasks import Word

TEXTS = st.lists(st.sampled_from(["hello", "world", "small", "model", "天", "气"]), min_size=1, max_size=8)


def words(texts, shift=0.0, longer=0.0):
    return [Word(text, i + shift, i + 0.5 + shift + longer) for i, text in enumerate(texts, 1)]


@given(TEXTS, st.floats(-0.9, 0.9))
def test_words_shifted_by_a_time_shift_by_that_time(texts, shift):
    measured = time_shift(words(texts), words(texts, shift))
    assert measured.average_ms == pytest.approx(1000 * abs(shift), abs=1e-6)
    assert measured.matched_share == 1


def test_start_and_end_count_half_each():
    assert time_shift(words(["a"]), words(["a"], longer=0.2)).average_ms == pytest.approx(100)


@given(TEXTS, st.data())
def test_a_wrong_word_is_left_out_of_the_average(texts, data):
    place = data.draw(st.integers(0, len(texts) - 1))
    said = words(texts, 0.03)
    said[place] = Word("different", 50.0, 60.0)
    measured = time_shift(words(texts), said)
    assert (measured.matched, measured.reference) == (len(texts) - 1, len(texts))
    assert len(texts) == 1 or measured.average_ms == pytest.approx(30)


def test_an_inserted_word_moves_no_other():
    said = [Word("extra", 0.0, 0.1), *words(["a", "b"], 0.04)]
    assert time_shift(words(["a", "b"]), said).average_ms == pytest.approx(40)


def test_case_and_punctuation_do_not_keep_words_apart():
    measured = time_shift([Word("Hello,", 0.1, 0.5), Word("-", 0.5, 0.6)], [Word("hello", 0.1, 0.5)], "en")
    assert measured == TimeShift(0.0, 1, 1)


def test_nothing_matched_has_no_average():
    assert time_shift(words(["a"]), []).average_ms is None
    assert time_shift([], []).matched_share is None


def test_sets_average_over_words():
    total = time_shift(words(["a"]), words(["a"], 0.1)) + time_shift(words(["a", "b", "c"]), words(["a", "b", "c"]))
    assert total.average_ms == pytest.approx(25)

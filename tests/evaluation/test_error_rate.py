import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.evaluation.error_rate import EditCounts, align, edit_counts

WORDS = st.lists(st.sampled_from(["a", "b", "c", "hello", "天", "气"]), max_size=12)


@given(WORDS)
def test_a_copy_has_no_errors(words):
    assert edit_counts(words, words) == EditCounts(correct=len(words))


@given(WORDS, st.data())
def test_one_more_word_is_one_insertion(words, data):
    place = data.draw(st.integers(0, len(words)))
    assert edit_counts(words, [*words[:place], "new", *words[place:]]) == EditCounts(len(words), insertions=1)


@given(WORDS, WORDS)
def test_swapping_sides_swaps_deletions_and_insertions(reference, hypothesis):
    there, back = edit_counts(reference, hypothesis), edit_counts(hypothesis, reference)
    assert there.errors == back.errors
    assert there.deletions - there.insertions == back.insertions - back.deletions == len(reference) - len(hypothesis)


@given(WORDS, WORDS)
def test_counts_add_up_to_both_lengths_and_to_the_textbook_distance(reference, hypothesis):
    counts = edit_counts(reference, hypothesis)
    assert counts.reference == len(reference)
    assert counts.correct + counts.substitutions + counts.insertions == len(hypothesis)
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        above, row = row, [i]
        for j, said in enumerate(hypothesis, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != said)))
    assert counts.errors == row[-1]


@given(st.lists(st.tuples(WORDS.filter(bool), WORDS), min_size=1, max_size=5))
def test_rate_of_a_set_is_that_of_jiwer(pairs):
    total = sum((edit_counts(*pair) for pair in pairs), EditCounts())
    references, hypotheses = ([" ".join(side) for side in sides] for sides in zip(*pairs, strict=True))
    assert total.rate == pytest.approx(jiwer.wer(references, hypotheses))


@given(WORDS, WORDS)
def test_spans_cover_both_sides_and_equal_ones_agree(reference, hypothesis):
    spans = align(reference, hypothesis)
    assert [w for span in spans for w in reference[span.reference]] == reference
    assert [w for span in spans for w in hypothesis[span.hypothesis]] == hypothesis
    assert all(reference[span.reference] == hypothesis[span.hypothesis] for span in spans if span.equal)


def test_a_missing_hypothesis_deletes_every_word():
    assert edit_counts(["a", "b"], None) == EditCounts(deletions=2)


def test_an_empty_reference_has_no_rate():
    assert edit_counts([], ["a"]).rate is None
    assert edit_counts([], None).rate is None

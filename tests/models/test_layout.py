import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.models.layout import lay_out, lay_out_left
from osum_npu.packing import STEP

PAD, BEGIN, END = "padding", "speech begin", "speech end"

ids = st.lists(st.integers(0, 500), max_size=6)
spoken = st.tuples(ids, st.integers(1, 9), ids, ids)
written = st.tuples(st.lists(st.integers(0, 500), min_size=1, max_size=6), st.none(), ids, ids)
batches = st.lists(st.one_of(spoken, written), min_size=1, max_size=5)


def columns(batch):
    """Prompts, speech lengths of the sounds, answers, which sound each is about, and what stands after it."""
    prompts, speech, after, answers = zip(*batch)
    sounds = [length for length in speech if length is not None]
    places = iter(range(len(sounds)))
    return prompts, sounds, answers, [None if length is None else next(places) for length in speech], after


def lay(batch):
    return lay_out(*columns(batch))


def lay_left(batch):
    prompts, sounds, _, about, after = columns(batch)
    return lay_out_left(prompts, sounds, about, after)


def wanted(batch):
    """What each sequence holds, in words."""
    rows, sound = [], 0
    for prompt, speech, after, answer in batch:
        heard = []
        if speech is not None:
            heard = [BEGIN, *(("speech", sound, place) for place in range(speech)), END]
            sound += 1
        rows.append([*tokens(prompt), *heard, *tokens(after), *tokens(answer)])
    return rows


def tokens(ids):
    return [("token", token) for token in ids]


def sequences(layout, sounds):
    """What each position of a row takes from the table."""
    table = [PAD, BEGIN, END, *tokens(layout.tokens.tolist())]
    table += [("speech", row, place) for row, speech in enumerate(sounds) for place in range(speech)]
    return [[table[source] for source in row] for row in layout.source_BL.tolist()]


@settings(deadline=None)
@given(batches)
def test_to_learn_all_sequences_lie_end_to_end(batch):
    layout = lay(batch)
    (row,) = sequences(layout, columns(batch)[1])
    want = wanted(batch)
    filling = len(row) - sum(map(len, want))
    assert row == [*(item for sequence in want for item in sequence), *[PAD] * filling]
    assert 0 <= filling < STEP
    assert len(row) % STEP == 0
    assert list(layout.packed) == [*map(len, want), *([filling] if filling else [])]


@settings(deadline=None)
@given(batches)
def test_to_answer_all_sequences_end_at_one_place(batch):
    layout = lay_left(batch)
    asked = wanted([(prompt, speech, after, []) for prompt, speech, after, _ in batch])
    longest = max(map(len, asked))
    rows = sequences(layout, columns(batch)[1])
    assert rows == [[PAD] * (longest - len(sequence)) + sequence for sequence in asked]
    assert layout.packed is None
    assert layout.label_N.numel() == layout.predictor_N.numel() == 0


@settings(deadline=None)
@given(batches)
def test_mask_and_positions_follow_the_padding(batch):
    for layout in (lay(batch), lay_left(batch)):
        inside = layout.source_BL != 0
        assert torch.equal(layout.mask_BL, inside)
        assert not layout.position_BL[~inside].any()
    for row, positions in zip(inside, layout.position_BL):
        assert positions[row].tolist() == list(range(row.sum()))
    packed = lay(batch)
    counts = [len(sequence) for sequence in wanted(batch)]
    assert packed.position_BL[packed.mask_BL].tolist() == [place for count in counts for place in range(count)]


@settings(deadline=None)
@given(batches)
def test_every_label_is_predicted_from_the_place_in_front_of_it(batch):
    layout = lay(batch)
    assert layout.label_N.tolist() == [token for *_, answer in batch for token in answer]
    (row,) = sequences(layout, columns(batch)[1])
    for place, label in zip(layout.predictor_N.tolist(), layout.label_N.tolist()):
        assert row[place + 1] == ("token", label)
    firsts = iter(layout.predictor_N.tolist())
    ends = [sum(map(len, wanted(batch)[: i + 1])) for i in range(len(batch))]
    for (*_, answer), end in zip(batch, ends):
        assert [next(firsts) for _ in answer] == list(range(end - len(answer) - 1, end - 1))


def test_by_default_each_prompt_is_about_an_utterance_of_its_own_and_nothing_stands_after_it():
    batch = [([1, 2], 3, [], [4]), ([], 1, [], [5, 6])]
    prompts, sounds, answers, _, _ = columns(batch)
    pairs = (lay_out(prompts, sounds, answers), lay(batch)), (lay_out_left(prompts, sounds), lay_left(batch))
    for one, other in pairs:
        assert torch.equal(one.source_BL, other.source_BL)
        assert torch.equal(one.predictor_N, other.predictor_N)


@settings(deadline=None)
@given(batches, st.data())
def test_several_prompts_about_one_utterance_take_the_same_speech(batch, data):
    speech = [length for _, length, *_ in batch if length is not None] or [2]
    about = data.draw(st.lists(st.integers(0, len(speech) - 1), min_size=1, max_size=6))
    asked = [([7, row], [8]) for row in range(len(about))]
    layout = lay_out([p for p, _ in asked], speech, [a for _, a in asked], about)
    want = []
    for row, utterance in enumerate(about):
        heard = [("speech", utterance, place) for place in range(speech[utterance])]
        want += [("token", 7), ("token", row), BEGIN, *heard, END, ("token", 8)]
    assert [source for source in sequences(layout, speech)[0] if source != PAD] == want

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.models.layout import lay_out, lay_out_left
from osum_npu.packing import STEP

PAD, BEGIN, END = "padding", "speech begin", "speech end"

ids = st.lists(st.integers(0, 500), max_size=6)
batches = st.lists(st.tuples(ids, st.integers(1, 9), ids), min_size=1, max_size=5)


def lay(batch):
    return lay_out(*zip(*batch))


def wanted(batch):
    """What each sequence holds, in words."""
    return [
        [
            *(("token", token) for token in prompt),
            BEGIN,
            *(("speech", row, place) for place in range(speech)),
            END,
            *(("token", token) for token in answer),
        ]
        for row, (prompt, speech, answer) in enumerate(batch)
    ]


def sequences(layout, batch):
    """What each position of a row takes from the table."""
    table = [PAD, BEGIN, END, *(("token", token) for token in layout.tokens.tolist())]
    table += [("speech", row, place) for row, (_, speech, _) in enumerate(batch) for place in range(speech)]
    return [[table[source] for source in row] for row in layout.source_BL.tolist()]


@settings(deadline=None)
@given(batches)
def test_to_learn_all_sequences_lie_end_to_end(batch):
    layout = lay(batch)
    (row,) = sequences(layout, batch)
    want = wanted(batch)
    filling = len(row) - sum(map(len, want))
    assert row == [*(item for sequence in want for item in sequence), *[PAD] * filling]
    assert 0 <= filling < STEP
    assert len(row) % STEP == 0
    assert list(layout.packed) == [*map(len, want), *([filling] if filling else [])]


@settings(deadline=None)
@given(batches)
def test_to_answer_all_sequences_end_at_one_place(batch):
    prompts, speech, _ = zip(*batch)
    layout = lay_out_left(prompts, speech)
    asked = wanted([(prompt, n, []) for prompt, n, _ in batch])
    longest = max(map(len, asked))
    assert sequences(layout, batch) == [[PAD] * (longest - len(sequence)) + sequence for sequence in asked]
    assert layout.packed is None
    assert layout.label_N.numel() == layout.predictor_N.numel() == 0


@settings(deadline=None)
@given(batches)
def test_mask_and_positions_follow_the_padding(batch):
    prompts, speech, _ = zip(*batch)
    for layout in (lay(batch), lay_out_left(prompts, speech)):
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
    (row,) = sequences(layout, batch)
    for place, label in zip(layout.predictor_N.tolist(), layout.label_N.tolist()):
        assert row[place + 1] == ("token", label)
    firsts = [place for place in layout.predictor_N.tolist() if row[place] == END]
    assert len(firsts) == sum(bool(answer) for *_, answer in batch)


@settings(deadline=None)
@given(batches, st.data())
def test_several_prompts_about_one_utterance_take_the_same_speech(batch, data):
    about = data.draw(st.lists(st.integers(0, len(batch) - 1), min_size=1, max_size=6))
    speech = [length for _, length, _ in batch]
    asked = [([7, row], [8]) for row in range(len(about))]
    layout = lay_out([p for p, _ in asked], speech, [a for _, a in asked], about)
    want = []
    for row, utterance in enumerate(about):
        heard = [("speech", utterance, place) for place in range(speech[utterance])]
        want += [("token", 7), ("token", row), BEGIN, *heard, END, ("token", 8)]
    assert [source for source in sequences(layout, batch)[0] if source != PAD] == want

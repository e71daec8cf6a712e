import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.models.layout import lay_out

PAD, BEGIN, END = "padding", "speech begin", "speech end"

ids = st.lists(st.integers(0, 500), max_size=6)
batches = st.lists(st.tuples(ids, st.integers(1, 9), ids), min_size=1, max_size=5)
sides = st.sampled_from(["left", "right"])


def lay(batch, side):
    prompts, speech, answers = zip(*batch)
    return lay_out(prompts, speech, answers, padding=side)


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
    """What each position of the layout takes from the table."""
    stride = max(speech for _, speech, _ in batch)
    table = [PAD, BEGIN, END, *(("token", token) for token in layout.tokens.tolist())]
    table += [("speech", row, place) for row in range(len(batch)) for place in range(stride)]
    return [[table[source] for source in row] for row in layout.source_BL.tolist()]


@settings(deadline=None)
@given(batches, sides)
def test_sequences_hold_prompt_speech_and_answer(batch, side):
    found = sequences(lay(batch, side), batch)
    longest = max(map(len, wanted(batch)))
    for got, want in zip(found, wanted(batch)):
        filling = [PAD] * (longest - len(want))
        assert got == (filling + want if side == "left" else want + filling)


@settings(deadline=None)
@given(batches, sides)
def test_mask_and_positions_follow_the_padding(batch, side):
    layout = lay(batch, side)
    inside = layout.source_BL != 0
    assert torch.equal(layout.mask_BL, inside)
    for row, positions in zip(inside, layout.position_BL):
        assert positions[row].tolist() == list(range(row.sum()))
        assert not positions[~row].any()


@settings(deadline=None)
@given(batches, sides)
def test_every_label_is_predicted_from_the_place_in_front_of_it(batch, side):
    layout = lay(batch, side)
    assert layout.label_N.tolist() == [token for *_, answer in batch for token in answer]
    found, length = sequences(layout, batch), layout.source_BL.shape[1]
    places = [divmod(flat, length) for flat in layout.predictor_N.tolist()]
    assert [row for row, _ in places] == [row for row, (*_, answer) in enumerate(batch) for _ in answer]
    for (row, place), label in zip(places, layout.label_N.tolist()):
        assert found[row][place + 1] == ("token", label)
    firsts = dict(reversed(places))
    assert all(found[row][place] == END for row, place in firsts.items())


@settings(deadline=None)
@given(batches)
def test_both_sides_of_padding_hold_the_same(batch):
    left, right = lay(batch, "left"), lay(batch, "right")
    for name in ("source_BL", "position_BL"):
        for i in range(len(batch)):
            mine, other = getattr(left, name)[i][left.mask_BL[i]], getattr(right, name)[i][right.mask_BL[i]]
            assert torch.equal(mine, other)
    assert torch.equal(left.tokens, right.tokens)
    assert torch.equal(left.label_N, right.label_N)


@settings(deadline=None)
@given(batches)
def test_inference_is_the_same_without_the_answer(batch):
    prompts, speech, _ = zip(*batch)
    layout = lay_out(prompts, speech, padding="left")
    assert sequences(layout, batch) == sequences(lay([(p, n, []) for p, n, _ in batch], "left"), batch)
    assert layout.label_N.numel() == layout.predictor_N.numel() == 0
    for row in sequences(layout, batch):
        assert row[-1] == END


@settings(deadline=None)
@given(batches, sides, st.data())
def test_several_prompts_about_one_utterance_take_the_same_speech(batch, side, data):
    about = data.draw(st.lists(st.integers(0, len(batch) - 1), min_size=1, max_size=6))
    speech = [length for _, length, _ in batch]
    asked = [([7, row], [8]) for row in range(len(about))]
    layout = lay_out([p for p, _ in asked], speech, [a for _, a in asked], about=about, padding=side)
    for got, row, utterance in zip(sequences(layout, batch), range(len(about)), about):
        heard = [("speech", utterance, place) for place in range(speech[utterance])]
        want = [("token", 7), ("token", row), BEGIN, *heard, END, ("token", 8)]
        assert [source for source in got if source != PAD] == want

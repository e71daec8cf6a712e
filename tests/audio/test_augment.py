import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.audio.augment import SpecAugmentConfig, apply, draw

N_MELS = 80

configs = st.builds(
    SpecAugmentConfig,
    time_masks=st.integers(0, 3),
    time_frames=st.integers(1, 60),
    frequency_masks=st.integers(0, 3),
    frequency_bins=st.integers(1, 90),
    substitutions=st.integers(0, 4),
    substitution_frames=st.integers(1, 40),
)


@settings(deadline=None, max_examples=50)
@given(configs, st.lists(st.integers(1, 150), min_size=1, max_size=4), st.integers(0, 2**32))
def test_applied_to_a_batch_as_to_each_alone(config, lengths, seed):
    rng = random.Random(seed)
    drawn = [draw(config, frames, N_MELS, rng) for frames in lengths]
    features = [torch.rand(frames, N_MELS) + 1 for frames in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    augmented = apply(padded, drawn)
    for row, one, feature in zip(augmented, drawn, features):
        expected = feature.numpy().copy()
        expected[one.hidden_frames] = 0
        expected[:, one.hidden_bins] = 0
        np.testing.assert_array_equal(row[: len(feature)], expected[one.source_frames])
        assert not row[len(feature) :].any()
    assert torch.equal(padded, torch.nn.utils.rnn.pad_sequence(features, batch_first=True)), "the input was changed"


@settings(deadline=None, max_examples=100)
@given(configs, st.integers(1, 300), st.integers(0, 2**32))
def test_limits(config, frames, seed):
    drawn = draw(config, frames, N_MELS, random.Random(seed))
    assert drawn.hidden_frames.sum() <= config.time_masks * config.time_frames
    assert drawn.hidden_bins.sum() <= config.frequency_masks * config.frequency_bins
    moved = drawn.source_frames != np.arange(frames)
    assert moved.sum() <= config.substitutions * config.substitution_frames
    assert (drawn.source_frames <= np.arange(frames)).all(), "a stretch comes from later"
    assert drawn.source_frames.min() >= 0


def test_drawing_depends_on_the_generator_alone():
    def drawn(seed):
        one = draw(SpecAugmentConfig(), 200, N_MELS, random.Random(seed))
        return one.hidden_frames.tolist(), one.hidden_bins.tolist(), one.source_frames.tolist()

    random.seed(1)
    before = drawn("0/3/utterance")
    state = random.getstate()
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    assert drawn("0/3/utterance") == before
    assert drawn("0/4/utterance") != before
    random.seed(1)
    assert random.getstate() == state, "the global generator was used"

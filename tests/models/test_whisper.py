import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from osum_npu.models.whisper import WhisperEncoder, WhisperEncoderConfig
from osum_npu.parity import relative_error

N_MELS = 80


def make(**sizes):
    torch.manual_seed(0)
    config = {"n_mels": N_MELS, "width": 24, "layers": 2, "heads": 3, "max_frames": 20}
    encoder = WhisperEncoder(WhisperEncoderConfig(**{**config, **sizes})).eval()
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return encoder


ENCODER = make()


def encode(*mels, encoder=ENCODER):
    """Encode as one batch, padded with zeros; one result an utterance."""
    padded = nn.utils.rnn.pad_sequence(mels, batch_first=True)
    encoded, lengths = encoder(padded, [len(mel) for mel in mels])
    return encoded.split(lengths)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.sampled_from([(1, 2), (2, 2), (1, 1), (2, 1), (3, 2)]),
    st.integers(0, 10**6),
)
def test_batch_equals_one_by_one(frames, strides, seed):
    torch.manual_seed(seed)
    encoder = make(strides=strides, max_frames=40)
    mels = [torch.randn(n, N_MELS) for n in frames]
    for together, mel in zip(encode(*mels, encoder=encoder), mels):
        (alone,) = encode(mel, encoder=encoder)
        first = math.ceil(len(mel) / strides[0])
        assert len(together) == len(alone) == encoder.length(len(mel)) == math.ceil(first / strides[1])
        assert relative_error(together, alone) <= 1e-5


@pytest.mark.parametrize("frames", [7, 8])
def test_another_utterance_of_the_batch_changes_nothing(frames):
    mel = torch.randn(frames, N_MELS, requires_grad=True)
    other = torch.randn(15, N_MELS, requires_grad=True)
    encode(mel, other)[0].square().sum().backward()
    assert not other.grad.any()
    assert mel.grad.abs().amin(1).gt(0).all(), "some frame is not heard"


def test_too_long_an_utterance_is_refused_in_words():
    longest = torch.zeros(1, 40, N_MELS)
    ENCODER(longest, [40])
    with pytest.raises(ValueError, match=r"of 0\.41 s is too long .* takes 0\.40 s: cut it, or raise .*max_frames"):
        ENCODER(torch.zeros(1, 41, N_MELS), [41])


def test_size_is_whisper_medium_s():
    with torch.device("meta"):
        encoder = WhisperEncoder(WhisperEncoderConfig())
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == 305.68
    assert encoder.positional_embedding.shape == (1500, 1024)


def test_gradients_reach_every_parameter():
    encoder = make(dropout=0.1).train()
    encoder(torch.randn(2, 30, N_MELS), [30, 17])[0].square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_acts_in_training_alone():
    encoder, mel = make(dropout=0.3), torch.randn(1, 30, N_MELS)
    assert torch.equal(encoder(mel, [30])[0], ENCODER(mel, [30])[0])
    encoder.train()
    assert not torch.equal(encoder(mel, [30])[0], encoder(mel, [30])[0])


@pytest.mark.parametrize(
    ("sizes", "complaint"), [({"heads": 5}, "not divisible by 5 heads"), ({"width": 25}, "multiple")]
)
def test_impossible_sizes_are_refused(sizes, complaint):
    with pytest.raises(ValidationError, match=complaint):
        make(**sizes)

"""The encoder against openai-whisper's and Hugging Face's, with their weights loaded as a user would load them."""

import os

import pytest
import torch
from torch import nn
from transformers import WhisperConfig, WhisperModel
from whisper.model import ModelDimensions, Whisper

from osum_npu import backend, op
from osum_npu.checkpoints.whisper import encoder_state, load_encoder
from osum_npu.models.whisper import WhisperEncoder, WhisperEncoderConfig
from osum_npu.parity import relative_error

FORWARD, GRADIENT = 1e-5, 1e-4

SIZES = {  # n_mels, width, heads, layers, encoder frames
    "like tiny": (80, 384, 6, 4, 60),
    "one head": (80, 20, 1, 1, 51),
    "odd head width": (128, 30, 6, 3, 37),
    "30 seconds": (80, 36, 3, 1, 1500),
}


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def attention_provider(request):
    backend.load("cpu").activate()
    op.force(f"attention={request.param}")
    yield
    op.force(os.environ.get(op.VARIABLE, ""))


def fill(module):
    """Random weights of a size that lets every part matter; norms and biases too."""
    for name, parameter in module.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        deviation = 0.05 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, mean=float(norm), std=deviation)
    return module


def openai(size, path):
    """Write an openai checkpoint; return its file and the original encoder, ``[B, T, M] -> [B, F, C]``."""
    n_mels, width, heads, layers, frames = size
    whisper = Whisper(ModelDimensions(n_mels, frames, width, heads, layers, 11, 8, 16, 2, 1))
    encoder = fill(whisper.encoder).eval()
    torch.save({"dims": vars(whisper.dims), "model_state_dict": whisper.state_dict()}, path / "whisper.pt")

    def compute(mel):
        encoder.positional_embedding = encoder.positional_embedding[: -(-mel.shape[1] // 2)]
        return encoder(mel.transpose(1, 2))

    return path / "whisper.pt", encoder, compute


def hugging_face(size, path):
    """Write a Hugging Face folder; return it and the original encoder."""
    n_mels, width, heads, layers, frames = size
    config = WhisperConfig(
        num_mel_bins=n_mels,
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        max_source_positions=frames,
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=8,
        vocab_size=11,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    whisper = WhisperModel(config).eval()
    encoder = whisper.encoder
    positions = encoder.embed_positions.weight.detach().clone()
    fill(encoder).embed_positions.weight.data.copy_(positions)
    whisper.save_pretrained(path / "whisper")

    def compute(mel):
        length = -(-mel.shape[1] // 2)
        encoder.embed_positions = nn.Embedding.from_pretrained(positions[:length])
        config.max_source_positions = length  # it refuses inputs of any other length, and all odd ones
        return encoder(mel.transpose(1, 2)).last_hidden_state

    return path / "whisper", encoder, compute


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("original", "shorter_by"), [(openai, 0), (openai, 1), (openai, 16), (hugging_face, 0), (hugging_face, 16)]
)
def test_values_and_gradients(original, size, shorter_by, tmp_path):
    torch.manual_seed(0)
    source, theirs, compute = original(size, tmp_path)
    n_mels, width, heads, layers, frames = size
    ours = WhisperEncoder(
        WhisperEncoderConfig(n_mels=n_mels, width=width, layers=layers, heads=heads, max_frames=frames)
    )
    load_encoder(ours, str(source))
    # Loud, for what all frames have in common, as the positions of a short input, gives the keys no gradient but noise.
    mel = 3 * torch.randn(2, 2 * frames - shorter_by, n_mels)
    our_mel, their_mel = mel.clone().requires_grad_(), mel.clone().requires_grad_()
    got, lengths = ours(our_mel, [mel.shape[1]] * 2)
    want = compute(their_mel)
    assert lengths == (want.shape[1],) * 2
    got = got.view_as(want)
    assert relative_error(got, want) <= FORWARD

    slope = torch.randn_like(want)
    (got * slope).sum().backward()
    (want * slope).sum().backward()
    assert relative_error(our_mel.grad, their_mel.grad) <= GRADIENT
    truth = {f"encoder.{name}": p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    truth = {name: gradient for name, gradient in encoder_state(truth).items() if name != "positional_embedding"}
    errors = {name: relative_error(p.grad, truth.pop(name)) for name, p in ours.named_parameters()}
    assert truth == {}
    assert {name: error for name, error in errors.items() if not error <= GRADIENT} == {}


def test_position_table_is_the_original_s():
    table = WhisperEncoder(WhisperEncoderConfig(width=384, heads=6)).positional_embedding
    original = Whisper(ModelDimensions(80, 1500, 384, 6, 1, 11, 8, 16, 2, 1)).encoder.positional_embedding
    assert relative_error(table, original) <= FORWARD

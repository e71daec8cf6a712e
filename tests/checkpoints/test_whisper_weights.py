import pytest
import torch
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel
from whisper.model import ModelDimensions, Whisper

from osum_npu.checkpoints.whisper import encoder_state, load_encoder
from osum_npu.models.whisper import WhisperEncoder, WhisperEncoderConfig

SIZE = {"n_mels": 80, "width": 24, "layers": 2, "heads": 3}


def make(max_frames=50, **size):
    return WhisperEncoder(WhisperEncoderConfig(**{**SIZE, "max_frames": max_frames, **size}))


def openai(frames=50, layers=2):
    """An openai model; its positions and norms are no defaults."""
    whisper = Whisper(ModelDimensions(80, frames, 24, 3, layers, 11, 8, 16, 2, 1))
    for parameter in whisper.parameters():
        nn.init.normal_(parameter)
    return whisper


def write(whisper, path):
    torch.save({"dims": vars(whisper.dims), "model_state_dict": whisper.state_dict()}, path)
    return str(path)


def hugging_face(kind):
    config = WhisperConfig(
        num_mel_bins=80,
        d_model=24,
        encoder_layers=2,
        encoder_attention_heads=3,
        encoder_ffn_dim=96,
        max_source_positions=50,
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=8,
        vocab_size=11,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    whisper = kind(config)
    for parameter in whisper.parameters():
        nn.init.normal_(parameter)
    return whisper


def differing(encoder, state):
    own = encoder.state_dict()
    own.pop("positional_embedding"), state.pop("positional_embedding")
    assert own.keys() == state.keys()
    return [name for name in own if not torch.equal(own[name], state[name])]


@pytest.mark.parametrize("frames", [50, 40, 60], ids=["as long", "shorter", "longer"])
def test_an_openai_file(frames, tmp_path):
    whisper, encoder = openai(frames), make()
    positions = encoder.positional_embedding.clone()
    load_encoder(encoder, write(whisper, tmp_path / "tiny.pt"))
    assert differing(encoder, whisper.encoder.state_dict()) == []
    assert torch.equal(encoder.positional_embedding, positions), "the position table is computed, not loaded"


def test_a_bare_state_dict(tmp_path):
    whisper, encoder = openai(), make()
    torch.save(whisper.state_dict(), tmp_path / "bare.pt")
    load_encoder(encoder, str(tmp_path / "bare.pt"))
    assert differing(encoder, whisper.encoder.state_dict()) == []


@pytest.mark.parametrize("kind", [WhisperModel, WhisperForConditionalGeneration])
def test_a_hugging_face_folder(kind, tmp_path):
    whisper, encoder = hugging_face(kind), make()
    whisper.save_pretrained(tmp_path)
    load_encoder(encoder, str(tmp_path))
    assert differing(encoder, encoder_state(whisper.state_dict())) == []


@pytest.mark.parametrize(
    ("size", "complaint"),
    [
        ({"layers": 3}, "blocks.2.attn.key.weight is missing"),
        ({"layers": 1}, "blocks.1.attn.key.weight is not in this encoder"),
        ({"width": 48}, r"blocks.0.attn.key.weight is \(24, 24\), wanted \(48, 48\)"),
        ({"n_mels": 128}, r"conv1.weight is \(24, 80, 3\), wanted \(24, 128, 3\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_of_another_size_are_refused_and_named(size, complaint, tmp_path):
    encoder, path = make(**size), write(openai(), tmp_path / "tiny.pt")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=f"{path} does not fit the encoder: .*{complaint}"):
        load_encoder(encoder, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_what_is_no_whisper_model_is_refused(tmp_path):
    torch.save({"model_state_dict": {"decoder.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"wanted the weights of a Whisper model .* found none"):
        load_encoder(make(), str(tmp_path / "other.pt"))


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 an archive"], ids=["empty", "text", "cut off"])
def test_a_broken_file_is_named(content, tmp_path):
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pt"):
        load_encoder(make(), str(tmp_path / "broken.pt"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.pt"):
        load_encoder(make(), str(tmp_path / "missing.pt"))


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "trapped"), "w")

    torch.save({"model_state_dict": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match=r"trap\.pt"):
        load_encoder(make(), str(tmp_path / "trap.pt"))
    assert not (tmp_path / "trapped").exists()

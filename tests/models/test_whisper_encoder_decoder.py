"""A whole Whisper against transformers' own, and what its decoder is given."""

import pytest
import tiny
import torch
from transformers import AutoTokenizer, WhisperForConditionalGeneration
from whisper.tokenizer import get_tokenizer

from osum_npu.models.whisper_encoder_decoder import TranscriptStart, WhisperEncoderDecoder
from osum_npu.tasks import TASKS, Utterance

FRAMES = [150, 97, 31]
"""Mel frames: even and odd, the longest first."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.write_whisper(tmp_path_factory.mktemp("whisper"))
    whisper = WhisperForConditionalGeneration.from_pretrained(folder)
    for parameter in whisper.parameters():  # as far from the defaults as a trained one
        parameter.data += 0.05 * torch.randn_like(parameter)
    whisper.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def batch(folder):
    rng = torch.Generator().manual_seed(1)
    features = torch.randn(len(FRAMES), max(FRAMES), 80, generator=rng)
    for row, frames in zip(features, FRAMES):
        row[frames:] = 0
    starts = [[7, 8, 9], [4], [5, 6]]
    answers = [[10, 11], [12, 13, 14, 15, 16], [17]]
    return features, FRAMES, starts, answers


def theirs(folder, features, start, answer):
    """Loss of transformers, summed over the answer: one utterance, its encoder's table cut to the utterance."""
    whisper = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    encoder, length = whisper.model.encoder, (len(features) + 1) // 2
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(encoder.embed_positions.weight[:length])
    encoder.config.max_source_positions = length
    if len(features) % 2:  # transformers wants an even number; the stride makes as many frames of one more zero frame
        encoder.conv1.register_forward_hook(lambda _, __, out: torch.nn.functional.pad(out[..., :-1], (0, 1), value=0))
        features = torch.cat([features, torch.zeros(1, features.shape[1])])
    tokens = [*start, *answer]
    labels = torch.tensor([[*([-100] * (len(start) - 1)), *answer]])
    loss = whisper(features.T[None], decoder_input_ids=torch.tensor([tokens[:-1]]), labels=labels).loss
    return loss.item() * len(answer)


def test_the_loss_is_that_of_transformers_on_each_utterance_alone(folder, batch):
    features, frames, starts, answers = batch
    model = WhisperEncoderDecoder.from_pretrained(str(folder)).eval()
    output = model(features, frames, model.layout(FRAMES, starts, answers, range(len(FRAMES))))
    alone = [theirs(folder, f[:n], s, a) for f, n, s, a in zip(features, FRAMES, starts, answers)]
    assert output.label_count == 8
    assert output.loss_sum.item() == pytest.approx(sum(alone), rel=1e-5)
    about = [*range(len(FRAMES)), 0]  # one more question about the first
    more = model(features, frames, model.layout(FRAMES, [*starts, starts[0]], [*answers, answers[0]], about))
    assert more.loss_sum.item() == pytest.approx(sum(alone) + alone[0], rel=1e-5)


def test_what_is_saved_is_what_was_loaded(folder, tmp_path):
    WhisperEncoderDecoder.from_pretrained(str(folder)).save_pretrained(tmp_path)
    before, after = (WhisperForConditionalGeneration.from_pretrained(path) for path in (folder, tmp_path))
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    assert before.generation_config.suppress_tokens
    assert after.generation_config.suppress_tokens is None, "they hold < and >, which begin and end a label"


@pytest.mark.parametrize(("lang", "text", "code"), [("en", "hi", "en"), ("zh-CN", "hi", "zh"), ("cmn", None, "zh")])
def test_the_start_is_that_of_openai(folder, lang, text, code):
    start = TranscriptStart.of(AutoTokenizer.from_pretrained(folder))
    utterance = Utterance(key="a", wav="a", lang=lang, text=text, prompt="not used")
    original = get_tokenizer(True, language=code, task="transcribe")
    sequence = original.decode([*original.sot_sequence_including_notimestamps])
    assert start(TASKS["emotion"], utterance) == f"{sequence}<TRANSCRIBE> <EMOTION>"


@pytest.mark.parametrize(("text", "code"), [("do 好", "zh"), ("do", "en"), (None, "en")])
def test_a_language_that_is_not_given_is_guessed_by_script(folder, text, code):
    start = TranscriptStart.of(AutoTokenizer.from_pretrained(folder))
    assert f"<|{code}|>" in start(TASKS["asr"], Utterance(key="a", wav="a", text=text))


def test_cantonese_is_chinese_where_whisper_has_no_mark_for_it():
    utterance = Utterance(key="a", wav="a", lang="yue")
    for known, code in (({"zh", "yue"}, "yue"), ({"zh"}, "zh")):
        assert f"<|{code}|>" in TranscriptStart(frozenset(known))(TASKS["asr"], utterance)
    with pytest.raises(ValueError, match="no mark for the language 'yue'"):
        TranscriptStart(frozenset({"en"}))(TASKS["asr"], utterance)


def test_marks_are_one_token_each_and_tags_are_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = TranscriptStart.of(tokenizer)(TASKS["gender"], Utterance(key="a", wav="a"))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    assert tokens[:4] == ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    assert "".join(tokens[4:]) == "<TRANSCRIBE>Ġ<GENDER>"


def test_a_tokenizer_of_something_else_is_refused(folder):
    class Other:
        def get_vocab(self):
            return {"<|startoftranscript|>": 0, "<|notimestamps|>": 1}

    with pytest.raises(ValueError, match=r"has no <\|transcribe\|>; wanted that of a Whisper"):
        TranscriptStart.of(Other())


def test_what_is_no_whisper_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        WhisperEncoderDecoder.from_pretrained(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="a model of type 'qwen2'; wanted a Whisper"):
        WhisperEncoderDecoder.from_pretrained(str(tmp_path))

"""OSUM's first stage: a whole Whisper learns the tasks, and its encoder goes to the next stage."""

import json

import pytest
import tiny
import torch
from transformers import AutoTokenizer, WhisperForConditionalGeneration, WhisperProcessor

from osum_npu.audio.mel import log_mel
from osum_npu.audio.read import read_audio
from osum_npu.checkpoints.distributed import read_model
from osum_npu.checkpoints.model_directory import load_model
from osum_npu.checkpoints.whisper import encoder_state
from osum_npu.data.sources import read_source
from osum_npu.models.whisper_encoder_decoder import TranscriptStart
from osum_npu.tasks import TASKS
from osum_npu.training.build import build
from osum_npu.training.log import Log, read_log
from osum_npu.training.loop import train
from osum_npu.training.optimizer import Optimizers, freeze, part_of

RANDOM = f"model={{kind: whisper, config: {json.dumps(tiny.WHISPER_SIZES)}, dropout: 0.1}}"
STAGE = (
    "{name: tagged, trainable: [encoder, decoder], steps: 6, learning_rate: 3e-3, batch_seconds: 12, "
    "micro_batch_seconds: 6, spec_augment: {time_frames: 10}, tasks: {asr: 1, timestamps: 1, gender: 1, chat: 1}}"
)


@pytest.fixture(autouse=True)
def _one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """Folder of a Whisper with its own tokenizer."""
    return tiny.write_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def stage1(corpus, whisper, tmp_path_factory):
    """Folder of a finished run on that Whisper."""
    out = tmp_path_factory.mktemp("stage1") / "run"
    with tiny.one_thread():
        train(recipe(corpus, out, whisper))
    return out


def recipe(corpus, out, whisper, *changes):
    return tiny.recipe(
        corpus, out, f"model={{kind: whisper, path: {whisper}, dropout: 0.1}}", f"stages=[{STAGE}]", *changes
    )


def losses(out):
    return [row["loss"] for row in read_log(out / "log.jsonl") if "loss" in row]


def test_the_loss_falls_and_the_dev_loss_is_measured(stage1):
    assert len(losses(stage1)) == 6
    assert losses(stage1)[-1] < 0.95 * losses(stage1)[0]
    assert [row["step"] for row in read_log(stage1 / "log.jsonl") if "dev_loss" in row] == [4, 6]


def test_the_finished_folder_is_a_whisper_of_transformers(stage1, whisper):
    folder = stage1 / "model"
    before, after = (WhisperForConditionalGeneration.from_pretrained(path) for path in (whisper, folder))
    same = {n for n, tensor in before.state_dict().items() if torch.equal(tensor, after.state_dict()[n])}
    assert same == {"model.encoder.embed_positions.weight"}
    assert after.generation_config.decoder_start_token_id == before.generation_config.decoder_start_token_id
    assert after.generation_config.suppress_tokens is None
    processor = WhisperProcessor.from_pretrained(folder)
    assert processor.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(whisper).get_vocab()
    assert processor.feature_extractor.feature_size == 80
    assert "model.encoder_weights" in (folder / "README.md").read_text("utf-8")
    assert not list(stage1.rglob("*.part"))
    with pytest.raises(ValueError, match=r"no model directory of this project.*model\.encoder_weights"):
        load_model(folder)


def test_transformers_generates_what_was_learned(corpus, whisper, tmp_path):
    """Overfit two utterances; then generate by transformers alone, from the start that training gave."""
    lines = (corpus / "train.jsonl").read_text("utf-8").splitlines()[:2]
    rows = [{**json.loads(line), "wav": str(corpus / json.loads(line)["wav"])} for line in lines]
    manifest = tmp_path / "two.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = "{name: tagged, trainable: [encoder, decoder], steps: 100, learning_rate: 5e-3, tasks: {gender: 1}}"
    changes = (f"data.train.tones={{path: {manifest}, weight: 1}}", "data.dev={}", "model.dropout=0")
    folder = train(recipe(corpus, tmp_path / "run", whisper, f"stages=[{stage}]", *changes))
    assert losses(tmp_path / "run")[-1] < 0.1 * losses(tmp_path / "run")[0]
    model, tokenizer = WhisperForConditionalGeneration.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for row, utterance in zip(rows, read_source(manifest, 30)[0]):
        wave = torch.from_numpy(read_audio(utterance.wav))[None]
        features = log_mel(wave, [wave.shape[1]])
        encoder = model.model.encoder  # cut to the utterance, as it was trained; transformers would pad it
        even = features.shape[1] // 2 * 2
        encoder.config.max_source_positions = even // 2
        table = WhisperForConditionalGeneration.from_pretrained(folder).model.encoder.embed_positions.weight
        encoder.embed_positions = torch.nn.Embedding.from_pretrained(table[: even // 2])
        start = TranscriptStart.of(tokenizer)(TASKS["gender"], utterance)
        ids = tokenizer(start, add_special_tokens=False, return_tensors="pt").input_ids
        said = model.generate(features[:, :even].mT, decoder_input_ids=ids, max_new_tokens=60)
        text = tokenizer.decode(said[0], skip_special_tokens=True).replace("<TRANSCRIBE> <GENDER>", "")
        assert text == f"{row['txt']}<{row['gender']}>"


def test_the_encoder_goes_to_the_next_stage(corpus, stage1, tmp_path):
    weights = f"model.encoder_weights={stage1 / 'model'}"
    stages = "stages=[{name: link, trainable: [adapter], steps: 2, learning_rate: 1e-3, batch_seconds: 12}]"
    model, _ = load_model(train(tiny.recipe(corpus, tmp_path / "run", weights, stages, "model.ctc=false")))
    trained = encoder_state(WhisperForConditionalGeneration.from_pretrained(stage1 / "model").state_dict())
    got = model.encoder.state_dict()
    assert got.keys() == trained.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in trained.items())


@pytest.mark.parametrize("last", [2, 4])
def test_a_stopped_run_ends_as_one_that_was_left_alone(last, corpus, stage1, whisper, tmp_path, monkeypatch):
    original = Log.advance

    def advance(log, stage):
        original(log, stage)
        if log.bar.n == last:
            raise KeyboardInterrupt

    run = recipe(corpus, tmp_path / "run", whisper)
    monkeypatch.setattr(Log, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    monkeypatch.undo()
    train(run)
    assert losses(tmp_path / "run") == losses(stage1)
    weights = [path / "model" / "model.safetensors" for path in (tmp_path / "run", stage1)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_stage_trains_its_part_alone(part, corpus, tmp_path):
    run = tiny.recipe(corpus, tmp_path / "run", RANDOM, f"stages=[{STAGE}]", f"stages.0.trainable=[{part}]")
    before = dict(build(run, read_source(corpus / "train.jsonl", 3)[0])[0].named_parameters())
    train(run)
    whisper = WhisperForConditionalGeneration.from_pretrained(tmp_path / "run/model")
    states = {"encoder": encoder_state(whisper.state_dict()), "decoder": whisper.model.decoder.state_dict()}
    after = {f"{part}.{name}": tensor for part in states for name, tensor in states[part].items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kept = read_model(tmp_path / "run/checkpoints/step_00000006")
    assert all(torch.equal(kept[name], after[name]) for name in kept)
    assert kept.keys() == {name for name in before if part_of(name) == part}
    assert {part_of(name) for name in changed} == {part}
    assert len(changed) > 0.9 * len([name for name in before if part_of(name) == part])


def test_tables_are_not_learned_by_muon(corpus, tmp_path):
    run = tiny.recipe(
        corpus,
        tmp_path / "run",
        RANDOM,
        f"stages=[{STAGE}]",
        "stages.0.muon_learning_rate=0.01",
        "stages.0.embedding_learning_rate=0.02",
    )
    model, _ = build(run, read_source(corpus / "train.jsonl", 3)[0])
    freeze(model, run.stages[0])
    adamw, _ = Optimizers(model, run.stages[0]).all
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in adamw.param_groups for p in group["params"]}
    matrices = {name for name in rates if name.endswith("weight") and dict(model.named_parameters())[name].ndim == 2}
    assert matrices == {"decoder.embed_tokens.weight", "decoder.embed_positions.weight"}
    assert rates["decoder.embed_tokens.weight"] == 0.02


def test_what_whisper_cannot_take_is_named_and_left_out(corpus, whisper, tmp_path):
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        row["wav"] = str(corpus / row["wav"])
    rows[3]["lang"] = "gsw"
    rows[5] |= {"txt": "do " * 40, "words": None}
    manifest = tmp_path / "mixed.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = (f"data.train.tones={{path: {manifest}}}", "stages.0.tasks={asr: 1}", "stages.0.batch_seconds=30")
    train(recipe(corpus, tmp_path / "run", whisper, *changes))
    lines = (tmp_path / "run" / "skipped.txt").read_text("utf-8").splitlines()
    assert sorted(lines) == [
        f"{rows[3]['key']}: this Whisper has no mark for the language 'gsw'",
        f"{rows[5]['key']}: its answer to asr has 119 tokens, more than the allowed 64",
    ]


def test_sizes_that_are_not_whispers_are_refused(corpus, tmp_path):
    run = tiny.recipe(corpus, tmp_path / "run", RANDOM, f"stages=[{STAGE}]", "model.config.encoder_ffn_dim=100")
    with pytest.raises(ValueError, match="encoder_ffn_dim must be 4 × d_model, 128, not 100"):
        train(run)

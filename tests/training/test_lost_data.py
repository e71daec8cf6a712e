"""What happens to data that cannot be used, and to numbers that explode."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
from safetensors.torch import load_file

from osum_npu.config import RecipeError
from osum_npu.training.log import read_log
from osum_npu.training.loop import train
from osum_npu.training.skipped import Skipped
from osum_npu.training.step import Computation

ONE_STAGE = "stages=[{name: all, trainable: [encoder, ctc, adapter, llm, lora], steps: 3, learning_rate: 3e-3}]"


def test_tasks_that_nothing_can_serve_are_missed_before_the_first_step(corpus, tmp_path):
    bare = tmp_path / "bare.jsonl"
    lines = [json.loads(line) for line in (corpus / "train.jsonl").read_text("utf-8").splitlines()]
    bare.write_text(
        "".join(
            json.dumps({"key": row["key"], "wav": str(corpus / row["wav"]), "txt": row["txt"]}) + "\n" for row in lines
        )
    )
    words = (f"data.train.tones.path={bare}", "stages.2.tasks={gender: 1, SER: 1}")
    with pytest.raises(ValueError, match=r"stage 'tune': no utterance .* tasks: gender, emotion"):
        train(tiny.recipe(corpus, tmp_path / "run", *words))
    assert not (tmp_path / "run" / "log.jsonl").exists()
    # dev data that cannot serve a stage is no fault: that stage has no dev loss
    train(tiny.recipe(corpus, tmp_path / "dev", f"data.dev.tones.path={bare}", "stages.2.tasks={gender: 1}"))
    assert [row["step"] for row in read_log(tmp_path / "dev" / "log.jsonl") if "dev_loss" in row] == [4, 8, 12]


def broken_corpus(corpus, folder):
    """The good rows, and others whose faults only show when the sound is read."""
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        row["wav"] = str(corpus / row["wav"])
    (folder / "text.wav").write_text("no sound")
    (folder / "empty.wav").touch()
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    soundfile.write(folder / "long.wav", 0.1 * np.ones(16000 * 6), 16000)
    whole = Path(rows[0]["wav"]).read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    bad = [
        {"key": name, "wav": str(folder / f"{name}.wav"), "txt": "do re", "duration": 1.0}
        for name in ("text", "empty", "nan", "cut", "gone", "long")
    ]
    bad += [{**row, "key": f"{row['key']}-probe", "duration": None} for row in bad]
    typo = {"key": "typo", "wav": "x.wav", "gendr": "male"}
    with (folder / "mixed.jsonl").open("w", encoding="utf-8") as file:
        for row in (*bad[:7], *rows, typo, *bad[7:]):
            file.write(json.dumps(row) + "\n")
        file.write('{"key": "torn"')
    return folder / "mixed.jsonl", {"typo", *(row["key"] for row in bad)}


def test_broken_data_costs_itself_alone_and_is_named(corpus, tmp_path):
    manifest, names = broken_corpus(corpus, tmp_path)
    out = tmp_path / "run"
    stage = "{name: all, trainable: [adapter], steps: 6, learning_rate: 1e-3, batch_seconds: 12}"
    train(tiny.recipe(corpus, out, f"stages=[{stage}]", f"data.train.tones={{path: {manifest}}}"))
    assert tiny.rows(out)[-1]["epoch"] >= 1  # all of it has been read
    assert all(map(math.isfinite, [row["loss"] for row in tiny.rows(out)]))
    lines = (out / "skipped.txt").read_text("utf-8").splitlines()
    assert len(lines) == len(set(lines)) == len(names) + 1
    for name in names:
        assert [line for line in lines if f"{name}: " in line], (name, lines)
    assert [line for line in lines if f"{manifest}:{len(names) + 40 + 1}: no JSON" in line]


def test_names_of_what_was_skipped_survive_a_kill(corpus, tmp_path, monkeypatch):
    manifest, names = broken_corpus(corpus, tmp_path)
    stage = "{name: all, trainable: [adapter], steps: 6, learning_rate: 1e-3, batch_seconds: 12}"
    recipe = tiny.recipe(corpus, tmp_path / "run", f"stages=[{stage}]", f"data.train.tones={{path: {manifest}}}")
    original = Computation.backward
    seen = []

    def killed_at_the_last_step(computation, stage, *words):
        seen.append(words)
        if len(seen) == stage.steps:
            monkeypatch.setattr(Skipped, "report", lambda skipped, say: None)  # a kill leaves no time for it
            raise KeyboardInterrupt
        return original(computation, stage, *words)

    monkeypatch.setattr(Computation, "backward", killed_at_the_last_step)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    monkeypatch.undo()
    train(recipe)
    lines = (tmp_path / "run" / "skipped.txt").read_text("utf-8")
    assert all(f"{name}: " in line for name in names for line in [lines])


def test_sound_longer_than_the_encoder_takes_is_skipped(corpus, tmp_path):
    """The limit of a model counts as much as that of the recipe."""
    out = tmp_path / "run"
    train(tiny.recipe(corpus, out, ONE_STAGE, "model.encoder.max_frames=32", "stages.0.steps=6"))
    skipped = (out / "skipped.txt").read_text("utf-8").splitlines()
    assert skipped
    assert all("is longer than the allowed 0.64 s" in line for line in skipped)
    assert len([row["loss"] for row in tiny.rows(out)]) == 6


def test_an_epoch_that_loses_all_its_sound_ends_in_words(corpus, tmp_path):
    manifest = tmp_path / "lost.jsonl"
    manifest.write_text("".join(json.dumps({"key": f"k{i}", "wav": "gone.wav", "txt": "do"}) + "\n" for i in range(3)))
    with pytest.raises(ValueError, match=r"lost\.jsonl: none of its rows can be used; first: .*gone\.wav"):
        train(tiny.recipe(corpus, tmp_path / "run", f"data.train.tones.path={manifest}"))


def test_missing_manifests_are_listed_together(corpus, tmp_path):
    with pytest.raises(RecipeError) as caught:
        train(tiny.recipe(corpus, tmp_path / "run", "data.train.tones.path=a.jsonl", "data.dev.more.path=b.jsonl"))
    assert len(caught.value.faults) == 2
    assert not (tmp_path / "run").exists()


def test_weights_that_explode_end_the_run_in_words(corpus, tmp_path):
    """Infinite gradients are left out of the update, and a run of nothing else gives up."""
    folder = train(tiny.recipe(corpus, tmp_path / "plain", ONE_STAGE))
    from safetensors.torch import save_file

    state = load_file(folder / "model.safetensors")
    state["adapter.projection.weight"][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    words = (f"model={{kind: saved, path: {folder}}}", ONE_STAGE, "stages.0.steps=30", "stages.0.batch_seconds=3")
    with pytest.raises(
        ValueError,
        match=r"10 updates in a row were left out.*gradient norm is not finite, with no earlier.*: lower learning_rate",
    ):
        train(tiny.recipe(corpus, tmp_path / "run", *words))

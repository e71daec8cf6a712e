"""A run that is killed and goes on ends exactly as one that was left alone."""

import json
import os
import pickle
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import tiny
import together
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from osum_npu.checkpoints import distributed
from osum_npu.config import RecipeError
from osum_npu.data.sources import read_source
from osum_npu.launch import World
from osum_npu.models.layout import lay_out
from osum_npu.training.build import build
from osum_npu.training.log import Log, read_log
from osum_npu.training.loop import train
from osum_npu.training.meter import MEASURED
from osum_npu.training.optimizer import part_of
from osum_npu.training.ranks import Ranks
from osum_npu.training.saver import checkpoints, newest_whole, read_facts
from osum_npu.training.state import read_progress

STEPS = 14
"""Of the tiny recipe: 4 to hear, 8 to understand, 2 to tune; a checkpoint every 3 and at the end of a stage."""


class StoppedError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(autouse=True)
def _one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture
def stop(monkeypatch):
    """Let every following run end right after this step of its optimiser."""
    original = Log.advance

    def stop_at(last):
        def advance(log, stage):
            original(log, stage)
            if log.bar.n == last:
                raise StoppedError

        monkeypatch.setattr(Log, "advance", advance)

    return stop_at


def numbers(out):
    """The log without what depends on the machine."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_log(out / "log.jsonl")]


def weights(out):
    return {
        name: (out / "model" / name).read_bytes()
        for name in ("model.safetensors", "adapter_model.safetensors", "tokenizer.json", "config.json")
    }


def test_the_log_holds_a_row_for_every_step_and_measurement(finished):
    rows = numbers(finished)
    assert [row["step"] for row in rows if "learning_rate" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "dev_loss" in row] == [4, 8, 12, 14]
    for row in rows:
        if "dev_loss" not in row:
            assert ("loss" in row) == (row["stage"] != "hear")
            assert ("ctc_loss" in row) == (row["stage"] != "tune")
            assert row["gradient_norm"] > 0
    assert [read_progress(path).step for path in checkpoints(finished / "checkpoints")] == [12, 14]


@pytest.mark.parametrize("last", [1, 4, 5, 8, 13])
def test_stopped_after_any_step_and_gone_on_with(last, corpus, finished, tmp_path, stop):
    recipe = tiny.recipe(corpus, tmp_path / "run")
    stop(last)
    with pytest.raises(StoppedError):
        train(recipe)
    assert numbers(tmp_path / "run")[-1]["step"] == last
    stop(None)
    train(recipe)
    assert numbers(tmp_path / "run") == numbers(finished)
    assert weights(tmp_path / "run") == weights(finished)


def test_stopped_again_and_again(corpus, finished, tmp_path, stop):
    recipe = tiny.recipe(corpus, tmp_path / "run", "checkpoint_every=1")
    for last in (2, 3, 6, 9, 11):
        stop(last)
        with pytest.raises(StoppedError):
            train(recipe)
    stop(None)
    train(recipe)
    assert numbers(tmp_path / "run") == numbers(finished)
    assert weights(tmp_path / "run") == weights(finished)


def kill_at_random(training, out, rng):
    """Kill all ranks: while they start, or soon after some steps; say whether a checkpoint was being written."""
    before, steps = len(read_log(out / "log.jsonl")), rng.choice([None, 1, 2, 4])
    deadline = time.monotonic() + (rng.uniform(0, 2) if steps is None else 60)
    while training.alive() and time.monotonic() < deadline:
        if steps is not None and len(read_log(out / "log.jsonl")) >= before + steps:
            time.sleep(rng.uniform(0, 0.1))
            break
        time.sleep(0.002)
    training.kill()
    return any((out / "checkpoints").glob("*.part"))


SLOW = "twenty trainings that are killed, and those before and after"


@pytest.mark.parametrize(
    ("kills", "processes", "sharding"),
    [
        (3, 1, "none"),
        *(
            pytest.param(20, *case, marks=pytest.mark.slow(reason=SLOW))
            for case in [(1, "none"), (2, "none"), (2, "full")]
        ),
    ],
)
def test_killed_at_random_moments(kills, processes, sharding, corpus, tmp_path):
    """SIGKILL of real processes, with workers that read ahead, also while they write; then the same words again."""
    seed = random.randrange(1000)
    rng = random.Random(seed)
    recipe = tiny.write_recipe(tmp_path / "tiny.yaml", corpus)
    changes = ["data.workers=1", "checkpoint_every=1", f"stages.1.steps={8 + 2 * kills}", f"sharding={sharding}"]
    together.train(recipe, f"out={tmp_path / 'whole'}", *changes, processes=processes)
    out, inside, alone = tmp_path / "run", 0, Ranks(World(), "gloo", torch.device("cpu"))
    for _ in range(kills):
        training = together.Training(recipe, f"out={out}", *changes, processes=processes)
        inside += kill_at_random(training, out, rng)
        said = []
        newest_whole(out / "checkpoints", alone, said.append)
        assert not said, seed
    reached = [path.name for path in checkpoints(out / "checkpoints")][-1:]
    print(f"{kills} kills, {inside} while a checkpoint was written; the last left {reached}; seed {seed}")
    together.train(recipe, f"out={out}", *changes, processes=processes)
    assert numbers(out) == numbers(tmp_path / "whole"), seed
    assert weights(out) == weights(tmp_path / "whole"), seed


def test_threads_do_not_change_the_order_of_sums(corpus, tmp_path):
    """Every sequence has the same two marks, so their gradient is a sum that threads may race for."""
    utterances, _ = read_source(corpus / "train.jsonl", 30)
    model, _ = build(tiny.recipe(corpus, tmp_path / "run"), utterances)
    model.requires_grad_(True)
    layout = lay_out([[5, 6]] * 3000, [4] * 3000, [[7]] * 3000)
    torch.manual_seed(0)
    speech, slope = torch.randn(12000, 32, requires_grad=True), torch.randn(*layout.source_BL.shape, 32)
    torch.set_num_threads(2)
    found = []
    for _ in range(20):
        inputs = [model.marks, speech, model.llm.get_input_embeddings().weight]
        found.append(torch.autograd.grad(model.embed(speech, layout), inputs, slope))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_second_optimiser_goes_on_too(corpus, tmp_path, stop):
    changes = ("stages.1.muon_learning_rate=1e-2", "stages.2.steps=1")
    train(tiny.recipe(corpus, tmp_path / "whole", *changes))
    recipe = tiny.recipe(corpus, tmp_path / "run", *changes)
    stop(8)
    with pytest.raises(StoppedError):
        train(recipe)
    stop(None)
    train(recipe)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_finished_run_stays_as_it_is(corpus, finished, tmp_path, stop):
    recipe = tiny.recipe(corpus, tmp_path / "run")
    train(recipe)
    before = numbers(tmp_path / "run")
    stop(1)  # no step is left to stop at
    train(recipe)
    assert numbers(tmp_path / "run") == before == numbers(finished)
    assert weights(tmp_path / "run") == weights(finished)


def test_half_a_checkpoint_and_half_a_row_are_ignored(corpus, finished, tmp_path, stop):
    recipe, out = tiny.recipe(corpus, tmp_path / "run"), tmp_path / "run"
    stop(8)
    with pytest.raises(StoppedError):
        train(recipe)
    torn = out / "checkpoints" / "step_00000008.part"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half of it")
    with (out / "log.jsonl").open("a") as log:
        log.write('{"stage": "understand", "step": 9, "lo')
    stop(None)
    train(recipe)
    assert numbers(out) == numbers(finished)
    assert weights(out) == weights(finished)


def flip(path):
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "a byte flipped": ("__0_0.distcp", flip, "has other bytes than were written"),
    "cut short": ("__0_0.distcp", cut, r"has \d+ bytes, not \d+"),
    "a file gone": (".metadata", Path.unlink, "cannot be read: No such file"),
    "another index": (".metadata", flip, "has other bytes than were written"),
    "no facts": ("progress.json", cut, "cannot be read, or names no files"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_taken(damage, finished, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished / "checkpoints", folder)
    older, newest = checkpoints(folder)
    alone = Ranks(World(), "gloo", torch.device("cpu"))
    assert newest_whole(folder, alone, print) == newest
    name, do, wanted = DAMAGE[damage]
    do(newest / name)
    said = []
    assert newest_whole(folder, alone, said.append) == older
    aside = f"put aside as {newest.name}.damaged, going on from {older.name}"
    assert re.fullmatch(f"{newest} is damaged: {name} {wanted}.*; {aside}", *said)
    assert {path.name for path in folder.iterdir()} == {older.name, f"{newest.name}.damaged"}


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(corpus, finished, tmp_path, stop, capsys):
    recipe, out = tiny.recipe(corpus, tmp_path / "run"), tmp_path / "run"
    stop(8)
    with pytest.raises(StoppedError):
        train(recipe)
    older, newest = checkpoints(out / "checkpoints")
    assert (older.name, newest.name) == ("step_00000004", "step_00000006")
    cut(newest / "__0_0.distcp")
    stop(None)
    train(recipe)
    assert f"{newest} is damaged" in capsys.readouterr().out
    assert numbers(out) == numbers(finished)
    assert weights(out) == weights(finished)


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(corpus, tmp_path, stop):
    recipe, out = tiny.recipe(corpus, tmp_path / "run"), tmp_path / "run"
    stop(8)
    with pytest.raises(StoppedError):
        train(recipe)
    for checkpoint in checkpoints(out / "checkpoints"):
        cut(checkpoint / "__0_0.distcp")
    before = sorted(out.rglob("*"))
    with pytest.raises(ValueError, match=r"step_00000006 is damaged.*\n.*04 is damaged.*\n.*to begin anew, rem"):
        train(recipe)
    assert sorted(out.rglob("*")) == before


def test_a_checkpoint_holds_what_has_been_trained_so_far_and_no_more(corpus, finished, tmp_path, stop):
    newest = checkpoints(finished / "checkpoints")[-1]
    progress = read_progress(newest)
    assert (progress.stage, progress.stage_step, progress.step) == (2, 2, STEPS)
    held = distributed.describe(newest)
    into = {name: torch.empty(held[name].size) for name in held if not name.startswith("rng.")}
    distributed.read(newest, into)
    assert all(tensor.isfinite().all() for tensor in into.values())
    assert set(into["optimizer.0.step"].tolist()) == {2}
    moments = {name.removeprefix("optimizer.0.") for name in held if name.startswith("optimizer.0.llm")}
    lora = {name for name in held if ".lora_" in name and name.startswith("model.")}
    assert moments == {f"{name.removeprefix('model.')}.{m}" for name in lora for m in ("exp_avg", "exp_avg_sq")}

    stop(5)
    with pytest.raises(StoppedError):
        train(tiny.recipe(corpus, tmp_path / "run"))
    first, _ = checkpoints(tmp_path / "run/checkpoints")
    parts = {part_of(name.removeprefix("model.")) for name in distributed.describe(first) if name.startswith("model.")}
    assert parts == {"encoder", "ctc"}
    assert read_facts(first)["frozen"].keys() == {"adapter", "llm", "lora"}


def test_weights_that_are_not_trained_may_not_change(corpus, finished, tmp_path, stop):
    stage = "{name: a, trainable: [adapter], steps: 3, learning_rate: 1e-3}"
    changes = [f"model={{kind: saved, path: {tmp_path / 'base'}}}", f"stages=[{stage}]", "checkpoint_every=1"]
    shutil.copytree(finished / "model", tmp_path / "base")
    recipe = tiny.recipe(corpus, tmp_path / "run", *changes)
    stop(3)
    with pytest.raises(StoppedError):
        train(recipe)
    changed = load_file(tmp_path / "base/model.safetensors")
    changed["encoder.ln_post.bias"][3] += 1e-6
    save_file(changed, tmp_path / "base/model.safetensors")
    stop(None)
    with pytest.raises(ValueError, match=r"not trained have changed since .*step_00000002: encoder: .*base, \w+ then"):
        train(recipe)
    shutil.copytree(finished / "model", tmp_path / "base", dirs_exist_ok=True)
    train(recipe)
    train(tiny.recipe(corpus, tmp_path / "whole", *changes))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_checkpoint_runs_no_code(finished, tmp_path):
    shutil.copytree(checkpoints(finished / "checkpoints")[-1], tmp_path / "step_1")
    (tmp_path / "step_1/.metadata").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(ValueError, match=r"\.metadata cannot be read: it names posix\.getcwd, which no check"):
        distributed.describe(tmp_path / "step_1")


class Attribute:
    """Pickled as Python 3.11.2 pickles a member of an enum: by ``getattr``."""

    def __init__(self, *words):
        self.words = words

    def __reduce__(self):
        return getattr, self.words


def test_an_index_is_read_that_another_python_wrote(tmp_path):
    member = Attribute(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"a": member})))
    assert distributed.describe(tmp_path) == {"a": _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attribute(Path, "cwd")))
    with pytest.raises(ValueError, match=r"it takes cwd from .*Path.*, which no checkpoint needs"):
        distributed.describe(tmp_path)


@pytest.mark.parametrize("change", ["another word", "a row less", "another order", "longer by a little"])
def test_data_that_changed_in_between_is_refused(change, corpus, tmp_path, stop):
    lines = (corpus / "train.jsonl").read_text("utf-8").replace('"wav": "', f'"wav": "{corpus}/').splitlines()
    manifest = tmp_path / "mine.jsonl"
    manifest.write_text("\n".join(lines), "utf-8")
    recipe = tiny.recipe(corpus, tmp_path / "run", f"data.train.mine={{path: {manifest}}}")
    stop(5)
    with pytest.raises(StoppedError):
        train(recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.p*") if path.is_file()}
    row = json.loads(lines[7])
    changed = {
        "another word": [*lines[:7], json.dumps({**row, "reply": "other"}), *lines[8:]],
        "a row less": lines[:-1],
        "another order": lines[::-1],
        "longer by a little": [*lines[:7], json.dumps({**row, "duration": row["duration"] + 0.01}), *lines[8:]],
    }
    manifest.write_text("\n".join(changed[change]), "utf-8")
    count = 39 if change == "a row less" else 40
    with pytest.raises(ValueError, match=rf"changed since .*step_00000004: mine: 40 utterances, \w+ then; {count} utt"):
        train(recipe)
    assert {path: path.read_bytes() for path in before} == before
    manifest.write_text("\n".join(lines), "utf-8")
    stop(6)
    with pytest.raises(StoppedError):
        train(recipe)


def test_another_recipe_in_the_same_folder_is_refused(corpus, tmp_path, stop):
    out = tmp_path / "run"
    train(tiny.recipe(corpus, out, "stages.1.steps=1"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match=r"holds a run of another recipe .*choose another out"):
        train(tiny.recipe(corpus, out, "stages.1.steps=2"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_recipe_that_failed_before_its_first_step_may_be_mended(corpus, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "empty.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="none of its rows can be used"):
        train(tiny.recipe(corpus, out, f"data.train.tones.path={tmp_path / 'empty.jsonl'}"))
    train(tiny.recipe(corpus, out, "stages.1.steps=1"))
    assert (out / "model" / "config.json").exists()

"""A disk that is full, a folder that cannot be written: said in words, with nothing lost."""

import os
import resource
from contextlib import contextmanager

import launching
import pytest
import tiny
import together
import torch

from osum_npu.checkpoints import distributed
from osum_npu.launch import World
from osum_npu.training.log import Log
from osum_npu.training.loop import train
from osum_npu.training.ranks import Ranks
from osum_npu.training.saver import Saver, checkpoints, newest_whole, read_facts

FULL = 60_000
"""Bytes after which a file cannot grow: less than a checkpoint of the tiny recipe, more than all else before it."""


@pytest.fixture(autouse=True)
def _one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture
def disk():
    """A disk that can be made full, as a limit on the size of files does it, and be given room again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Disk:
        def fill(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, hard))

        def empty(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    made = Disk()
    yield made
    made.empty()


def test_a_disk_that_is_full_from_the_first_checkpoint_on_ends_the_run(corpus, tmp_path, disk):
    out = tmp_path / "run"
    recipe = tiny.recipe(corpus, out)
    disk.fill()
    with pytest.raises(ValueError, match=r"a checkpoint could not be written to .*File too large; make room there"):
        train(recipe)
    assert list((out / "checkpoints").iterdir()) == []
    disk.empty()
    train(recipe)


def test_a_disk_that_is_full_for_a_while_costs_the_checkpoints_of_that_while(
    corpus, finished, tmp_path, disk, monkeypatch, capsys
):
    out, advance, say = tmp_path / "run", Log.advance, Log.say

    def fill(log, stage):
        advance(log, stage)
        if log.bar.n == 5:
            disk.fill()

    def empty(log, message):
        say(log, message)
        if "make room there" in message:
            assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000004"]
            disk.empty()

    monkeypatch.setattr(Log, "advance", fill)
    monkeypatch.setattr(Log, "say", empty)
    train(tiny.recipe(corpus, out, "keep_checkpoints=1"))
    assert "The one before is kept, and training goes on" in capsys.readouterr().out
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step_00000014"]
    files = [path / "model/model.safetensors" for path in (out, finished)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", ["", "checkpoints", "model"])
def test_a_folder_that_cannot_be_written_is_named(name, corpus, tmp_path):
    """A file in its place stands for a missing permission, which root would not miss."""
    out = tmp_path / "run"
    recipe = tiny.recipe(corpus, out)
    if name:
        out.mkdir()
    (out / name).with_name(f"{name or 'run'}.part" if name == "model" else name or "run").write_text("a file")
    with pytest.raises(ValueError, match=rf"could not be written to {out / name}.*: \[Errno"):
        train(recipe)


@contextmanager
def saver(folder, keep=2):
    made = Saver(folder, keep, Ranks(World(), "gloo", torch.device("cpu")), print)
    yield made
    made.finish()


def test_what_is_saved_is_what_was_there_when_it_was_saved(tmp_path):
    weight = torch.zeros(1_000_000)
    with saver(tmp_path, keep=2) as one:
        for step in (1, 2, 3):
            weight.fill_(step)
            one.save(step, {"model.weight": weight}, {"step": step})
            weight.fill_(-1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    for step, path in zip((2, 3), checkpoints(tmp_path)):
        assert read_facts(path)["step"] == step
        assert distributed.read_model(path)["weight"].unique().tolist() == [step]


def test_saving_leaves_the_threads_of_the_training_alone(tmp_path):
    """OpenMP gives a thread that computes threads of its own; with more than cores, all sleep between operations."""
    tensors = {f"model.{i}": torch.ones(1_000_000) for i in range(2)}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1_000_000).add_(1)  # now the thread of the test has a second one
        before = len(os.listdir("/proc/self/task"))
        with saver(tmp_path) as one:
            one.reserve(tensors)
            for step in (1, 2):
                one.save(step, tensors, {})
            one.finish()
            assert len(os.listdir("/proc/self/task")) <= before + 1
    finally:
        torch.set_num_threads(threads)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for value in (1.0, 2.0):
        with saver(tmp_path) as one:
            one.save(7, {"model.weight": torch.full((3,), value)}, {})
    newest = newest_whole(tmp_path, Ranks(World(), "gloo", torch.device("cpu")), pytest.fail)
    assert distributed.read_model(newest)["weight"].tolist() == [2.0] * 3


def _write_two_at_once(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = Ranks(World(rank=rank, local_rank=rank, world_size=2), "gloo", torch.device("cpu"))
    savers = {name: Saver(folder / name, 2, ranks, pytest.fail) for name in ("checkpoints", "best")}
    for step in range(1, 6):
        # the ranks' threads need not take turns alike: here they never do
        for name in sorted(savers, reverse=bool(rank)):
            numbers = torch.full((1000 if name == "best" else 3000,), float(step))
            savers[name].save(step, {f"model.{name}": numbers}, {"of": name})
    for saver in savers.values():
        saver.finish(needed=True)
    ranks.leave()


def test_the_best_and_the_newest_are_written_at_the_same_time(tmp_path):
    port = launching.free_port()
    processes = [together.CONTEXT.Process(target=_write_two_at_once, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    for name, length in (("checkpoints", 3000), ("best", 1000)):
        assert [path.name for path in checkpoints(tmp_path / name)] == ["step_00000004", "step_00000005"]
        newest = newest_whole(tmp_path / name, Ranks(World(), "gloo", torch.device("cpu")), pytest.fail)
        assert read_facts(newest)["of"] == name
        assert distributed.read_model(newest)[name].tolist() == [5.0] * length

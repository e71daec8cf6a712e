"""Updates that are left out, and runs that go back: planted gradients that are none, or far too large."""

import math
from contextlib import contextmanager

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.data.plan import plan_epoch
from osum_npu.training.feed import Feed
from osum_npu.training.log import Log, read_log
from osum_npu.training.loop import train
from osum_npu.training.meter import MEASURED
from osum_npu.training.optimizer import Optimizers
from osum_npu.training.step import Computation
from osum_npu.training.watch import KNOWN, STREAK, WINDOW, Watch

STAGE = "{name: all, trainable: [encoder, adapter, llm], steps: 40, learning_rate: 3e-3, batch_seconds: 2}"
WORDS = (f"stages=[{STAGE}]", "dev_every=100", "checkpoint_every=6", "model.ctc=false", "data.dev={}")
BAD = range(25, 25 + STREAK)
"""Places of data that makes STREAK updates in a row too large."""


@pytest.fixture(autouse=True)
def _one_thread():
    with tiny.one_thread():
        yield


@contextmanager
def planted(factor, places):
    """Multiply the gradients of all steps whose data is at one of these places, counted from 0 over all epochs."""
    steps, backward, lengths, current = Feed.steps, Computation.backward, {}, []

    def noted(feed, stage, start):
        for step in steps(feed, stage, start):
            current[:] = [place(feed, stage, step.after, lengths)]
            yield step

    def multiplied(computation, *words):
        found = backward(computation, *words)
        if current[0] in places:
            for parameter in computation.model.parameters():
                if parameter.grad is not None:
                    parameter.grad *= factor
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Feed, "steps", noted)
        patch.setattr(Computation, "backward", multiplied)
        yield


def place(feed, stage, after, lengths):
    """Count the steps of data before the one that ends at ``after``."""

    def length(epoch):
        if epoch not in lengths:
            plan = plan_epoch(feed.train, stage.tasks, batch_seconds=stage.batch_seconds, seed=0, epoch=epoch)
            lengths[epoch] = len(plan)
        return lengths[epoch]

    return sum(map(length, range(after.epoch))) + after.step - 1


def numbers(out, *without):
    dropped = {*MEASURED, *without}
    return [{k: v for k, v in row.items() if k not in dropped} for row in read_log(out / "log.jsonl")]


def weights(out):
    return (out / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def skipped(corpus, tmp_path_factory):
    """A run whose optimiser is not called at step 26."""
    out, original, calls = tmp_path_factory.mktemp("skipped") / "run", Optimizers.step, []

    def step(optimizers, rate):
        calls.append(rate)
        if len(calls) != 26:
            original(optimizers, rate)

    with tiny.one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizers, "step", step)
        train(tiny.recipe(corpus, out, *WORDS))
    return out


@pytest.mark.parametrize("factor", [math.nan, 1e4])
def test_a_planted_fault_costs_its_own_update_alone(factor, skipped, corpus, tmp_path, capsys):
    out = tmp_path / "run"
    with planted(factor, {25}):
        train(tiny.recipe(corpus, out, *WORDS))
    said = capsys.readouterr().out
    assert said.count("its update is left out") == 1
    assert "step 26: the gradient norm is " in said
    assert weights(out) == weights(skipped)
    assert [row["left_out"] for row in read_log(out / "log.jsonl")] == [0] * 25 + [1] * 15


@pytest.fixture(scope="module")
def turned(corpus, tmp_path_factory):
    """A run that meets BAD."""
    out = tmp_path_factory.mktemp("turned") / "run"
    with tiny.one_thread(), planted(1e4, BAD):
        train(tiny.recipe(corpus, out, *WORDS))
    return out


def test_faults_that_do_not_end_turn_the_run_back(turned, corpus, tmp_path, monkeypatch):
    """Steps 26 to 35 are left out; the run is that which goes from the checkpoint of step 24 to the data of step 36."""
    original = Feed.steps

    def steps(feed, stage, start):
        lengths = {}
        for step in original(feed, stage, start):
            if place(feed, stage, step.after, lengths) not in range(24, BAD.stop):
                yield step

    monkeypatch.setattr(Feed, "steps", steps)
    train(tiny.recipe(corpus, tmp_path / "run", *WORDS))
    assert weights(tmp_path / "run") == weights(turned)
    assert numbers(tmp_path / "run", "left_out") == numbers(turned, "left_out")
    assert [row["left_out"] for row in read_log(turned / "log.jsonl")] == [0] * 24 + [STREAK] * 16


def test_a_run_that_is_killed_turns_back_all_the_same(turned, corpus, tmp_path, capsys):
    """Killed before the faults, among them, and after the turn, where the log counts on from step 24 again."""
    original, out = Log.advance, tmp_path / "run"
    for last, time in ((22, 1), (31, 1), (26, 2), (40, 1)):
        counted = []

        def advance(log, stage, last=last, time=time, counted=counted):
            original(log, stage)
            counted.append(log.bar.n)
            if counted.count(last) == time:
                raise KeyboardInterrupt

        with planted(1e4, BAD), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Log, "advance", advance)
            with pytest.raises(KeyboardInterrupt):
                train(tiny.recipe(corpus, out, *WORDS))
    with planted(1e4, BAD):
        train(tiny.recipe(corpus, out, *WORDS))
    said = capsys.readouterr().out
    assert f"step 35: {STREAK} updates in a row were left out, the last because the gradient norm is" in said
    assert said.count("rewound to step 24, on with the data behind") == 2
    assert weights(out) == weights(turned)
    assert numbers(out) == numbers(turned)


def test_a_run_turns_back_further_where_the_first_turn_does_not_help(corpus, tmp_path, capsys):
    with planted(1e4, range(25, 25 + 2 * STREAK)):
        train(tiny.recipe(corpus, tmp_path / "run", *WORDS))
    said = capsys.readouterr().out
    assert "rewound to step 24, on" in said
    assert "step 34: 10 updates" in said
    assert "rewound to step 18, on" in said
    assert [row["step"] for row in read_log(tmp_path / "run/log.jsonl")] == list(range(1, 41))


@pytest.mark.parametrize(
    ("kept", "rewinds", "words"), [(2, 2, "with no earlier checkpoint of this stage"), (9, 3, "after 3 rewinds")]
)
def test_a_run_that_nothing_helps_gives_up(kept, rewinds, words, corpus, tmp_path, capsys):
    with (
        planted(math.nan, range(25, 1000)),
        pytest.raises(ValueError, match=rf"10 updates in a row .*{words}.*: lower"),
    ):
        train(tiny.recipe(corpus, tmp_path / "run", *WORDS, f"keep_checkpoints={kept}"))
    assert capsys.readouterr().out.count("rewound to step") == rewinds


def test_a_later_stage_turns_back_to_its_beginning(corpus, tmp_path, capsys):
    stage = "{{name: {}, trainable: [adapter, llm], steps: {}, learning_rate: 1e-3, batch_seconds: 4}}"
    stages = f"stages=[{stage.format('a', 3)}, {stage.format('b', 20)}]"
    with planted(math.nan, range(4, 4 + STREAK)):
        train(tiny.recipe(corpus, tmp_path / "run", *WORDS, stages, "checkpoint_every=100"))
    said = capsys.readouterr().out
    assert "rewound to step 3, on with the data behind" in said
    assert said.count("stage b:") == 2
    rows = [row["step"] for row in read_log(tmp_path / "run/log.jsonl") if "learning_rate" in row]
    assert rows == list(range(1, 24))


def test_a_stage_that_turns_back_to_its_beginning_forgets_what_it_has_learned(corpus, tmp_path, monkeypatch):
    """The checkpoint at the end of stage a holds the LLM too, which only stage b trains."""
    stage = "{{name: {}, trainable: [{}], steps: {}, learning_rate: 1e-3, batch_seconds: 4}}"
    stages = f"stages=[{stage.format('a', 'adapter', 3)}, {stage.format('b', 'llm', 18)}]"
    words = (*WORDS, stages, "checkpoint_every=100")
    with planted(math.nan, range(4, 4 + STREAK)):
        train(tiny.recipe(corpus, tmp_path / "turned", *words))
    original = Feed.steps

    def steps(feed, stage, start):
        lengths = {}
        for step in original(feed, stage, start):
            if stage.name == "a" or place(feed, stage, step.after, lengths) >= 4 + STREAK:
                yield step

    monkeypatch.setattr(Feed, "steps", steps)
    train(tiny.recipe(corpus, tmp_path / "run", *words))
    assert weights(tmp_path / "run") == weights(tmp_path / "turned")


# -- judging


def settled(tmp_path, value=2.0, factor=30.0):
    watch = Watch(tmp_path / "watch.json", factor)
    for _ in range(KNOWN):
        assert watch.fault({"gradient_norm": value, "loss": value}, clip=5.0) == ""
    return watch


@given(usual=st.floats(1e-3, 1e3), times=st.floats(0.01, 1e4), factor=st.floats(1.5, 100))
def test_a_spike_is_far_above_the_median_and_harmful(usual, times, factor, tmp_path_factory):
    watch = settled(tmp_path_factory.getbasetemp(), usual, factor)
    value = usual * times
    if not math.isclose(times, factor, rel_tol=1e-6):
        assert bool(watch.fault({"gradient_norm": value}, clip=5.0)) == (times > factor and value > 5.0)
        assert bool(watch.fault({"loss": value}, clip=5.0)) == (times > factor and value > 1.0)


def test_nothing_is_a_spike_before_the_usual_is_known(tmp_path):
    watch = Watch(tmp_path / "watch.json", 30.0)
    for _ in range(KNOWN - 1):
        assert not watch.fault({"gradient_norm": 1.0}, clip=5.0)
    assert not watch.fault({"gradient_norm": 1e6}, clip=5.0)


def test_the_usual_follows_the_run_but_not_what_is_left_out(tmp_path):
    watch = settled(tmp_path)
    for _ in range(WINDOW):
        assert watch.fault({"gradient_norm": 1e3}, clip=5.0)
    for _ in range(WINDOW):
        assert not watch.fault({"gradient_norm": 50.0}, clip=5.0)
    assert not watch.fault({"gradient_norm": 1e3}, clip=5.0)


def test_what_is_known_is_remembered_by_checkpoint(tmp_path):
    watch = settled(tmp_path)
    watch.save(10, keep=2)
    watch.fault({"gradient_norm": torch.inf}, clip=5.0)
    watch.save(20, keep=2)
    other = Watch(tmp_path / "watch.json", 30.0)
    other.load(10)
    assert (other.left_out, other.streak, list(other.seen["loss"])) == (0, 0, [2.0] * KNOWN)
    other.load(20)
    assert (other.left_out, other.streak) == (1, 1)
    other.load(15)
    assert (other.left_out, other.streak, other.seen) == (0, 0, {})

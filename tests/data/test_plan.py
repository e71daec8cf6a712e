"""The plan of an epoch: nothing lost, nothing too often, nothing too long."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.audio.tar_member import TarMember
from osum_npu.data import plan as plan_module
from osum_npu.data.plan import Example, WeightedSource, cut, plan_epoch, servable
from osum_npu.tasks import TASKS, Utterance, missing

LABELS = {task.name: task.labels[0] for task in TASKS.values() if task.labels}


def utterance(key, duration, names=("asr",)):
    """An utterance that can serve exactly the tasks named, and asr where it has a text."""
    return Utterance(
        key=key,
        wav=f"{key}.wav",
        duration=duration,
        text="a" if "asr" in names else None,
        labels={name: LABELS[name] for name in names if name in LABELS},
        reply="b" if "chat" in names else None,
    )


def in_tar(number, per_tar, **fields):
    """An utterance whose sound lies in one of several tars."""
    tar = f"{number // per_tar}.tar"
    return replace(utterance(f"{tar}/{number}", 1.0, **fields), wav=TarMember(tar, f"{number}.wav", 512, 9))


DURATIONS = st.floats(0.05, 40)
NAMES = st.sets(st.sampled_from(["asr", "gender", "emotion"]), max_size=3)
WEIGHTS = st.floats(0.01, 3) | st.integers(1, 3).map(float)


@st.composite
def mixtures(draw):
    return [
        WeightedSource(
            [
                utterance(f"{s}-{i}", duration, names)
                for i, (duration, names) in enumerate(draw(st.lists(st.tuples(DURATIONS, NAMES), max_size=25)))
            ],
            draw(WEIGHTS),
        )
        for s in range(draw(st.integers(1, 3)))
    ]


def seconds(example):
    return example.utterance.duration


@settings(max_examples=80, deadline=None)
@given(mixtures(), st.floats(1, 60), st.integers(0, 3), st.integers(0, 5), st.booleans())
def test_a_plan_keeps_its_promises(sources, budget, seed, epoch, shortest_first):
    tasks = {"asr": 1.0, "gender": 2.0}
    able = [u for source in sources for u in source.utterances if servable(u, tasks)]

    def plan():
        return plan_epoch(sources, tasks, batch_seconds=budget, seed=seed, epoch=epoch, shortest_first=shortest_first)

    if not able:
        if not any(round(source.weight * len(source.utterances)) for source in sources):
            return
        with pytest.raises(ValueError, match=r"no utterance of the training data carries .*asr, gender"):
            plan()
        return
    counts_wanted = {}
    for source in sources:
        whole, part = divmod(source.weight, 1)
        again = round(part * len(source.utterances))
        for u in source.utterances:
            counts_wanted[u.key] = {int(whole)} | ({int(whole) + 1} if again else set())
            if again == len(source.utterances):
                counts_wanted[u.key] = {int(whole) + 1}
    try:
        steps = plan()
    except ValueError:  # so small a weight that none of the able ones was drawn
        assert all(source.weight < 1 for source in sources if any(servable(u, tasks) for u in source.utterances))
        return
    drawn = Counter(example.utterance.key for step in steps for example in step)
    for u in able:
        assert drawn[u.key] in counts_wanted[u.key]
    assert drawn.keys() <= {u.key for u in able}
    for example in (example for step in steps for example in step):
        assert example.tasks[0].name in tasks
        assert not missing(example.tasks[0], example.utterance)
    for step in steps:
        assert [seconds(e) for e in step] == sorted(map(seconds, step), reverse=True)
        assert sum(map(seconds, step)) <= budget or len(step) == 1
    if shortest_first and epoch == 0:
        assert [seconds(step[0]) for step in steps] == sorted(seconds(step[0]) for step in steps)
    assert plan() == steps


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 5))
def test_a_fractional_weight_takes_that_share(count, weight):
    source = WeightedSource([utterance(str(i), 1.0) for i in range(count)], weight)
    steps = plan_epoch([source, WeightedSource([utterance("x", 1.0)])], {"asr": 1}, batch_seconds=9, seed=0, epoch=0)
    drawn = Counter(example.utterance.key for step in steps for example in step)
    assert drawn.pop("x") == 1
    assert abs(drawn.total() - weight * count) <= 0.5 + 1e-9
    assert set(drawn.values()) <= {math.floor(weight), math.ceil(weight), round(weight)}


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 4), min_size=1, max_size=3),
    counts=st.lists(st.integers(1, 90), min_size=3, max_size=3),
    loose=st.integers(0, 60),
    block=st.integers(1, 120),
)
def test_shards_keep_fractional_weights_and_lose_nothing(weights, counts, loose, block):
    """Whatever the size of the blocks, each source comes as often as its weight says, to the row."""
    sources = [
        WeightedSource([replace(in_tar(i, 7), key=f"{s}/{i}") for i in range(count)], weight)
        for s, (weight, count) in enumerate(zip(weights, counts))
    ]
    sources.append(WeightedSource([utterance(f"loose/{i}", 1.0) for i in range(loose)], 1.5))
    if not any(round(source.weight * len(source.utterances)) for source in sources):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_BLOCK", block)
        steps = plan_epoch(sources, {"asr": 1}, batch_seconds=9, seed=0, epoch=0)
    drawn = Counter(example.utterance.key for step in steps for example in step)
    for source in sources:
        times = [drawn.pop(u.key, 0) for u in source.utterances]
        whole, part = divmod(source.weight, 1)
        assert sum(times) == int(whole) * len(times) + round(part * len(times))
        assert set(times) <= {int(whole), int(whole) + 1}
    assert not drawn


def test_large_sets_are_read_a_few_tars_at_a_time(monkeypatch):
    """Also where a small source comes many times over, and rows with files of their own are spread evenly."""
    monkeypatch.setattr(plan_module, "_BLOCK", 100)
    sources = [
        WeightedSource([in_tar(i, 20) for i in range(600)]),
        WeightedSource([replace(in_tar(i, 20), key=f"often/{i}") for i in range(20)], 30.0),
        WeightedSource([utterance(f"loose/{i}", 1.0) for i in range(600)]),
    ]
    steps = plan_epoch(sources, {"asr": 1}, batch_seconds=10, seed=0, epoch=0)
    rows = [example.utterance for step in steps for example in step]
    assert len(rows) == 1800
    for start in range(0, 1800, 150):  # a block of 100 rows in tars takes 50 with files of their own
        part = rows[start : start + 150]
        assert sum(isinstance(u.wav, str) for u in part) == 50
        assert len({u.wav.tar for u in part if not isinstance(u.wav, str)}) <= 5
    often = [start // 150 for start, u in enumerate(rows) if u.key.startswith("often/")]
    assert len(set(often)) > 6
    assert len({u.key for u in rows[:150]} & {u.key for u in rows[150:300]}) <= 20


def corpus(count=400):
    return [WeightedSource([utterance(str(i), 1 + i % 7, ("asr", "gender", "emotion")) for i in range(count)], 1.5)]


def keys(steps):
    return [[example.utterance.key for example in step] for step in steps]


def test_seed_and_epoch_decide_the_order_and_who_comes_again():
    plans = {
        (seed, epoch): plan_epoch(corpus(), {"asr": 1, "gender": 1}, batch_seconds=20, seed=seed, epoch=epoch)
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len({str(keys(steps)) for steps in plans.values()}) == len(plans)
    again = [Counter(k for step in keys(steps) for k in step) for steps in plans.values()]
    assert len({frozenset(k for k, n in counts.items() if n == 2) for counts in again}) == len(plans)
    first, second = (dict(zip(keys(plans[0, e])[0], plans[0, e][0], strict=True)) for e in (0, 1))
    assert first.keys() != second.keys()


def test_tasks_are_drawn_in_proportion_to_their_weights():
    tasks = {"asr": 1.0, "gender": 2.0, "emotion": 5.0}
    steps = plan_epoch(corpus(4000), tasks, batch_seconds=100, seed=0, epoch=0)
    drawn = Counter(example.tasks[0].name for step in steps for example in step)
    for name, weight in tasks.items():
        share, n = weight / 8, drawn.total()
        assert abs(drawn[name] - share * n) < 5 * math.sqrt(n * share * (1 - share))


def test_a_task_is_drawn_only_where_its_labels_are():
    sources = [WeightedSource([utterance("a", 1, ("asr",)), utterance("g", 1, ("gender",)), utterance("n", 1, ())])]
    seen = {
        (example.utterance.key, example.tasks[0].name)
        for epoch in range(20)
        for step in plan_epoch(sources, {"asr": 1, "gender": 9}, batch_seconds=5, seed=0, epoch=epoch)
        for example in step
    }
    assert seen == {("a", "asr"), ("g", "gender")}


def test_steps_are_full_and_hold_all_lengths_and_sources():
    """A step of one length would teach one source alone, where sources differ in length."""
    lengths = {"words": 0.6, "sentences": 4.0, "paragraphs": 11.0}
    sources = [
        WeightedSource([utterance(f"{name}{i}", length * (1 + i / 3000)) for i in range(round(2000 / length))])
        for name, length in lengths.items()
    ]
    steps = plan_epoch(sources, {"asr": 1}, batch_seconds=120, seed=0, epoch=0)
    assert sum(seconds(example) for step in steps for example in step) / (120 * len(steps)) > 0.9
    for step in steps[:-1]:
        assert {example.utterance.key.rstrip("0123456789") for example in step} >= {"words", "sentences"}
    mixed = [step for step in steps if any(example.utterance.key.startswith("paragraphs") for example in step)]
    assert len(mixed) > 0.9 * len(steps)


@given(st.lists(st.floats(0.1, 20), max_size=40), st.floats(0.5, 60))
def test_micro_batches_hold_all_and_keep_the_budget(durations, budget):
    falling = sorted(durations, reverse=True)
    examples = [Example(utterance(str(i), d), (TASKS["asr"],)) for i, d in enumerate(falling)]
    groups = cut(examples, budget)
    assert [example for group in groups for example in group] == examples
    for group in groups:
        assert group
        assert sum(map(seconds, group)) <= budget or len(group) == 1
    for group, following in pairwise(groups):  # none could have taken one more
        assert sum(map(seconds, group)) + seconds(following[0]) > budget


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.integers(1, 4))
def test_as_many_different_questions_as_an_utterance_can_serve(sources, questions):
    tasks = {"asr": 1.0, "gender": 2.0, "emotion": 0.5}
    if not any(servable(u, tasks) for source in sources for u in source.utterances):
        return
    whole = [WeightedSource(source.utterances) for source in sources]
    steps = plan_epoch(whole, tasks, batch_seconds=20, seed=0, epoch=0, questions=questions)
    for example in (example for step in steps for example in step):
        assert len(set(example.tasks)) == len(example.tasks)
        assert len(example.tasks) == min(questions, len(servable(example.utterance, tasks)))


def test_combinations_are_drawn_by_weight_among_the_rows_with_all_their_labels():
    both, one = utterance("both", 2.0, ("asr", "gender", "age")), utterance("one", 2.0, ("asr", "gender"))
    silent = utterance("silent", 2.0, ("gender", "age"))
    tasks = {"asr": 1.0, "age+gender": 3.0, "age+gender-only": 1.0}
    able = {row.key: [task.name for task in servable(row, tasks)] for row in (both, one, silent)}
    assert able == {"both": list(tasks), "one": ["asr"], "silent": ["age+gender-only"]}
    steps = plan_epoch([WeightedSource([both], 1000)], tasks, batch_seconds=20, seed=0, epoch=0)
    drawn = Counter(task.name for step in steps for example in step for task in example.tasks)
    assert drawn["age+gender"] / 1000 == pytest.approx(0.6, abs=0.06)
    assert drawn["age+gender-only"] / 1000 == pytest.approx(0.2, abs=0.06)

"""Checkpoints of OSUM and OSUM-Pangu, imported, against the numbers that the original code computed with them."""

import pytest
import replay

RECORDINGS = {"osum": replay.Recording("osum.json"), "osum_pangu": replay.Recording("osum_pangu.json")}
MERGED = "_merged"
"""Behind the name of a system: with LoRA folded into the LLM."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each model as it is first asked for."""

    class Models(dict):
        def __missing__(self, name):
            recording = RECORDINGS[name.removesuffix(MERGED)]
            self[name] = recording.load(tmp_path_factory.mktemp(name), merge=name.endswith(MERGED))
            return self[name]

    return Models()


def each(names):
    """Every name that a recording gives, with its system."""
    return [
        pytest.param(system, name, id=f"{system}-{name}")
        for system, recording in RECORDINGS.items()
        for name in names(recording)
    ]


def forward(wanted):
    """Forward cases of which ``wanted`` holds."""
    return each(lambda recording: [name for name in recording.forward if wanted(recording.cases[name])])


EVERY = forward(lambda _: True)


@pytest.mark.parametrize(("system", "key"), each(lambda recording: recording.golden["weight_check"]))
def test_the_weights_are_those_of_the_recording(system, key):
    replay.check_weight(RECORDINGS[system], key)


@pytest.mark.parametrize(("system", "samples"), each(lambda recording: recording.golden["features"]))
def test_features(system, samples):
    replay.check_features(RECORDINGS[system], samples)


@pytest.mark.parametrize(("system", "name"), EVERY)
def test_tensors_and_loss(system, name, models):
    replay.check_tensors_and_loss(RECORDINGS[system], models[system], name)


@pytest.mark.parametrize(("system", "name"), EVERY)
def test_positions_and_labels(system, name, models):
    replay.check_positions_and_labels(RECORDINGS[system], models[system], name)


@pytest.mark.parametrize(("system", "name"), forward(lambda case: "grads" in case))
def test_gradients(system, name, models):
    replay.check_gradients(RECORDINGS[system], models[system], name)


@pytest.mark.parametrize(("system", "name"), forward(lambda case: "speech_embeds_batch_against_single" in case))
def test_the_habit_changes_what_it_changed(system, name, models):
    replay.check_what_the_habit_changes(RECORDINGS[system], models[system], name)


@pytest.mark.parametrize(("system", "name"), forward(lambda case: len(case["batch"]) > 1))
def test_without_the_habit_a_batch_is_its_singles(system, name, models):
    replay.check_a_batch_against_its_singles(RECORDINGS[system], models[system], name)


@pytest.mark.parametrize(("system", "name"), forward(lambda case: len(case["batch"]) == 1))
def test_folded_weights_compute_the_same(system, name, models):
    replay.check_folded(RECORDINGS[system], models[system + MERGED], name)


@pytest.mark.parametrize("together", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize(("system", "name"), each(lambda recording: recording.generate))
def test_answers(system, name, together, models):
    replay.check_answers(RECORDINGS[system], models[system], name, together=together)

"""An original checkpoint of OSUM, imported, against the numbers that the original code computed with it."""

import pytest
import replay

RECORDING = replay.Recording("osum.json")
CASES, FORWARD = RECORDING.cases, RECORDING.forward


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return RECORDING.load(tmp_path_factory.mktemp("osum"), merge=False)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return RECORDING.load(tmp_path_factory.mktemp("merged"), merge=True)


@pytest.mark.parametrize("key", RECORDING.golden["weight_check"])
def test_the_weights_are_those_of_the_recording(key):
    replay.check_weight(RECORDING, key)


@pytest.mark.parametrize("samples", RECORDING.golden["features"])
def test_features(samples):
    replay.check_features(RECORDING, samples)


@pytest.mark.parametrize("name", FORWARD)
def test_tensors_and_loss(name, model):
    replay.check_tensors_and_loss(RECORDING, model, name)


@pytest.mark.parametrize("name", FORWARD)
def test_positions_and_labels(name, model):
    replay.check_positions_and_labels(RECORDING, model, name)


@pytest.mark.parametrize("name", [name for name in FORWARD if "grads" in CASES[name]])
def test_gradients(name, model):
    replay.check_gradients(RECORDING, model, name)


@pytest.mark.parametrize("name", [name for name in FORWARD if "speech_embeds_batch_against_single" in CASES[name]])
def test_the_habit_changes_what_it_changed(name, model):
    replay.check_what_the_habit_changes(RECORDING, model, name)


@pytest.mark.parametrize("name", [name for name in FORWARD if len(CASES[name]["batch"]) > 1])
def test_without_the_habit_a_batch_is_its_singles(name, model):
    replay.check_a_batch_against_its_singles(RECORDING, model, name)


@pytest.mark.parametrize("name", [name for name in FORWARD if len(CASES[name]["batch"]) == 1])
def test_folded_weights_compute_the_same(name, merged):
    replay.check_folded(RECORDING, merged, name)


@pytest.mark.parametrize("together", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize("name", RECORDING.generate)
def test_answers(name, together, model):
    replay.check_answers(RECORDING, model, name, together=together)

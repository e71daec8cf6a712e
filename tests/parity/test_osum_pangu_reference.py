"""An original checkpoint of OSUM-Pangu, imported, against the numbers that the original code computed with it."""

import pytest
import replay
import torch

RECORDING = replay.Recording("osum_pangu.json")
CASES, FORWARD = RECORDING.cases, RECORDING.forward
HALF_TENSORS, HALF_LOSS = 8e-2, 5e-3
"""Allowed in bfloat16, to the worst entry relative to its tensor's root-mean-square, and to the loss; text and sound
lie in one tensor, and the loudest rows decide."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return RECORDING.load(tmp_path_factory.mktemp("pangu"), merge=False)


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


@pytest.mark.parametrize("name", FORWARD)
def test_in_bfloat16(name, model):
    with torch.autocast("cpu", torch.bfloat16):
        replay.check_tensors_and_loss(RECORDING, model, name, HALF_TENSORS, HALF_LOSS)


@pytest.mark.parametrize("name", RECORDING.cases)
def test_the_parts_stand_in_the_recorded_order(name):
    """The names of the segments, put together from the form."""
    case = CASES[name]
    utterances = case.get("batch") or case["outputs"]
    form = RECORDING.form(case)
    before, _, after = RECORDING.asked(case, utterances)
    tokenizer, mark = replay.Tokenizer(), [replay.Tokenizer.bos_token_id]
    for one, ids, behind in zip(utterances, before, after):
        parts, wanted = {"before": [], "after": []}, case["layout"]
        for segment in wanted:
            place = "after" if "speech" in segment or segment == "template:assistant" else "before"
            if segment.startswith("template:"):
                text = RECORDING.golden["templates"][segment.removeprefix("template:")]
                (own,) = tokenizer([text], add_special_tokens=False).input_ids
                parts[place] += [*(mark if form.begin_of_text != "none" else []), *own]
            elif segment == "prompt":
                parts[place] += [*(mark if form.begin_of_text == "all" else []), *RECORDING.ids(one["prompt"])]
        assert (ids, behind) == (parts["before"], parts["after"])
        assert ("speech" in wanted) == (one["wave"] is not None)

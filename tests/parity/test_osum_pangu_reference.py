"""What OSUM-Pangu's recording says beyond the numbers in test_osum_reference.py: bfloat16, the order of the parts."""

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

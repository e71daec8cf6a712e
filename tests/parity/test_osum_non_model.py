"""What OSUM does beside its model, against numbers recorded from ASLP-lab/OSUM: ``non_model`` of ``osum.json``.

Its ``dynamic_batch`` is left out: those batches lose samples, and ours lose none (tests/data/test_plan.py).
"""

import json
import os
import random
from pathlib import Path

import pytest
import torch

from osum_npu.audio.augment import SpecAugmentConfig, apply, draw
from osum_npu.config import Stage
from osum_npu.data.row import STYLE_NAMES, parse_row
from osum_npu.evaluation.error_rate import EditCounts, edit_counts
from osum_npu.evaluation.text import release_tokens
from osum_npu.tasks import TASKS, normalize_text
from osum_npu.training.optimizer import schedule

GOLDEN = Path(os.environ.get("OSUM_GOLDEN_DIR") or Path(__file__).parents[1] / "golden") / "osum.json"
if not GOLDEN.is_file():
    pytest.skip(f"there is no {GOLDEN}; OSUM_GOLDEN_DIR names its folder", allow_module_level=True)
RECORDED = json.loads(GOLDEN.read_text("utf-8"))["non_model"]
SCORED = [sample for sample in RECORDED["wer"]["samples"] if sample["counts"]]
N_MELS = 80


def expand(row):
    """Write the runs ``a..b`` out."""
    numbers = []
    for word in row.split():
        first, _, last = word.partition("..")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


@pytest.mark.parametrize(("text", "written"), RECORDED["process_text"])
def test_text_is_normalised(text, written):
    assert normalize_text(text) == written


@pytest.mark.parametrize(("raw", "style"), RECORDED["style_map"].items())
def test_styles_are_mapped(raw, style):
    assert style in TASKS["style"].labels
    assert STYLE_NAMES.get(raw, raw) == style
    row = {"key": "k", "wav": "k.wav", "task": "<TRANSCRIBE> <STYLE>", "txt": f"你好<{raw}>"}
    utterance, faults = parse_row(row, "")
    assert (utterance.labels, faults) == ({"style": style}, [])


@pytest.mark.parametrize("recorded", RECORDED["warmup_lr"], ids=lambda one: f"warmup {one['warmup_steps']}")
def test_the_learning_rate_of_every_step(recorded):
    steps, rate = recorded["after_n_optimizer_steps"][-1][0] + 1, recorded["base_lr"]
    stage = Stage(
        name="s",
        trainable=("llm",),
        steps=steps,
        learning_rate=rate,
        warmup_steps=recorded["warmup_steps"],
        schedule="inverse_sqrt",
    )
    for done, wanted in recorded["after_n_optimizer_steps"]:
        assert stage.learning_rate * schedule(stage, done) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("recorded", RECORDED["spec_augment"], ids=lambda one: f"seed {one['python_random_seed']}")
def test_augmentation_is_drawn(recorded):
    masking, substitution, frames = recorded["spec_aug"], recorded["spec_sub"], recorded["frames"]
    masks = SpecAugmentConfig(
        time_masks=masking["num_t_mask"],
        time_frames=masking["max_t"],
        frequency_masks=masking["num_f_mask"],
        frequency_bins=masking["max_f"],
        substitutions=0,
    )
    drawn = draw(masks, frames, N_MELS, random.Random(recorded["python_random_seed"]))
    assert drawn.hidden_frames.nonzero()[0].tolist() == expand(recorded["zero_frames"])
    assert drawn.hidden_bins.nonzero()[0].tolist() == expand(recorded["zero_bins"])
    hidden = apply(torch.ones(1, frames, N_MELS), [drawn])
    assert (hidden == 0).sum().item() == recorded["n_zero"]

    substitutions = SpecAugmentConfig(
        time_masks=0,
        frequency_masks=0,
        substitutions=substitution["num_t_sub"],
        substitution_frames=substitution["max_t"],
    )
    drawn = draw(substitutions, frames, N_MELS, random.Random(recorded["python_random_seed"]))
    assert drawn.source_frames.tolist() == expand(recorded["source_frame_per_frame"])
    numbered = torch.arange(frames, dtype=torch.float32)[None, :, None].expand(1, frames, N_MELS)
    assert apply(numbered, [drawn])[0, :, 0].tolist() == expand(recorded["source_frame_per_frame"])


def test_defaults_of_the_augmentation():
    recorded, config = RECORDED["spec_augment"][0], SpecAugmentConfig()
    assert recorded["spec_aug"] == {
        "num_t_mask": config.time_masks,
        "num_f_mask": config.frequency_masks,
        "max_t": config.time_frames,
        "max_f": config.frequency_bins,
    }
    assert recorded["spec_sub"] == {"max_t": config.substitution_frames, "num_t_sub": config.substitutions}


@pytest.mark.parametrize("sample", SCORED, ids=lambda sample: sample["key"])
def test_counts_of_the_scorer(sample):
    counts = edit_counts(release_tokens(sample["ref"]), release_tokens(sample["hyp"]))
    numbers = [counts.reference, counts.correct, counts.substitutions, counts.deletions, counts.insertions]
    assert numbers == sample["counts"]


def test_rate_of_the_scorer():
    total = sum((edit_counts(release_tokens(s["ref"]), release_tokens(s["hyp"])) for s in SCORED), EditCounts())
    numbers = [total.reference, total.correct, total.substitutions, total.deletions, total.insertions]
    assert numbers == RECORDED["wer"]["overall"]
    assert f"{100 * total.rate:.2f}" == RECORDED["wer"]["overall_percent"]

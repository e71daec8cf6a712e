"""A training that cannot fit its device is warned of before it begins, and begins."""

import os
from dataclasses import replace

import pytest
import tiny
import torch

from osum_npu.data.sources import read_source
from osum_npu.planning import fit
from osum_npu.planning.fit import fit_warnings, present
from osum_npu.training import loop
from osum_npu.training.build import build

STAGE = "stages=[{name: tune, trainable: [lora], steps: 1, learning_rate: 1e-3, batch_seconds: 2}]"


@pytest.fixture
def recipe(corpus, tmp_path):
    return tiny.recipe(corpus, tmp_path / "run", STAGE)


@pytest.fixture
def model(recipe, corpus):
    return build(recipe, read_source(corpus / "train.jsonl", 30)[0])[0]


def test_the_memory_of_this_machine_is_asked_of_the_system():
    device = present(torch.device("cpu"))
    assert device.memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert present(torch.device("meta")) is None


def test_only_what_does_not_fit_is_warned_of_and_no_number_is_drawn(recipe, model, monkeypatch):
    monkeypatch.setattr(fit, "LARGE", 0)
    here, state = present(torch.device("cpu")), torch.get_rng_state()
    small = replace(here, memory=here.runtime + 1e6)
    assert fit_warnings(recipe, model, torch.float32, here, 1) == []
    (line,) = fit_warnings(recipe, model, torch.float32, small, 1)
    assert "stage 'tune' does not fit this device: it needs" in line
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(fit, "LARGE", 1e9)
    assert fit_warnings(recipe, model, torch.float32, small, 1) == []


def test_a_plan_that_fails_is_a_line_too(recipe, model, monkeypatch):
    monkeypatch.setattr(fit, "LARGE", 0)
    model.llm.config.hidden_act = "unheard of"
    (line,) = fit_warnings(recipe, model, torch.float32, present(torch.device("cpu")), 1)
    assert "cannot be told" in line


def test_a_training_that_does_not_fit_is_warned_of_and_trains(recipe, monkeypatch, capsys):
    monkeypatch.setattr(fit, "LARGE", 0)
    here = present(torch.device("cpu"))
    monkeypatch.setattr(loop, "present", lambda _: replace(here, memory=here.runtime + 1e6))
    with tiny.one_thread():
        out = loop.train(recipe)
    assert "warning: stage 'tune' does not fit this device" in capsys.readouterr().out
    assert (out / "model.safetensors").exists()

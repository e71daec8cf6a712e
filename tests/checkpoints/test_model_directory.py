import json

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, WhisperFeatureExtractor

from osum_npu.audio.mel import log_mel
from osum_npu.checkpoints.model_directory import load_model, save_model
from osum_npu.config import load_recipe
from osum_npu.models.adapters import OsumAdapterConfig
from osum_npu.models.llm import build_llm
from osum_npu.models.lora import LoraSettings
from osum_npu.models.speech_llm import SpeechLLM, make_config
from osum_npu.models.tokenizer import train_tokenizer
from osum_npu.models.whisper import WhisperEncoderConfig
from osum_npu.parity import relative_error
from osum_npu.training.build import build

TOKENIZER = train_tokenizer(["hello world", "how are you"], ["<male>", "<female>"], 300)


def make(seed=0):
    torch.manual_seed(seed)
    llm = {
        "model_type": "qwen2",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(TOKENIZER),
        "tie_word_embeddings": True,
    }
    encoder = WhisperEncoderConfig(width=16, layers=1, heads=2, max_frames=50)
    adapter = OsumAdapterConfig(layers=1, heads=2, feed_forward=24, max_positions=20)
    model = SpeechLLM(make_config(encoder, adapter, llm, LoraSettings(rank=2)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.train()


def same(one, other):
    state, again = one.state_dict(), other.state_dict()
    return state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)


def test_saved_and_loaded(tmp_path):
    model = make()
    save_model(model, TOKENIZER, tmp_path / "model", "# A card\n")
    loaded, tokenizer = load_model(str(tmp_path / "model"))
    assert same(loaded, model)
    assert not loaded.training
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer("hello<male> wörld").input_ids == TOKENIZER("hello<male> wörld").input_ids
    assert (tmp_path / "model" / "README.md").read_text("utf-8") == "# A card\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_others_can_read_it(tmp_path):
    save_model(make(), TOKENIZER, tmp_path / "model", "")
    folder = tmp_path / "model"
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.do_sample) == (TOKENIZER.eos_token_id, False)
    assert AutoTokenizer.from_pretrained(folder).decode(TOKENIZER("how are you").input_ids) == "how are you"
    assert json.loads((folder / "config.json").read_text("utf-8"))["model_type"] == "speech_llm"

    wave = np.random.default_rng(0).normal(size=16000).astype(np.float32) / 10
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    theirs = extractor(wave, sampling_rate=16000, padding=False, return_tensors="np").input_features[0].T
    ours = log_mel(torch.from_numpy(wave)[None], [16000])
    assert relative_error(ours[0], theirs) <= 1e-4


def test_an_older_one_is_replaced_as_a_whole(tmp_path):
    save_model(make(0), TOKENIZER, tmp_path / "model", "old")
    (tmp_path / "model" / "left_over.txt").write_text("from before", "utf-8")
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "broken_off.txt").write_text("by a kill", "utf-8")
    newer = make(1)
    save_model(newer, TOKENIZER, tmp_path / "model", "new")
    assert same(load_model(tmp_path / "model")[0], newer)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert not names & {"left_over.txt", "broken_off.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_on_the_way_leaves_the_older_one(tmp_path):
    class FullDisk:
        eos_token_id = pad_token_id = 0

        def save_pretrained(self, folder):
            raise OSError("no space left on device")

    older = make(0)
    save_model(older, TOKENIZER, tmp_path / "model", "old")
    with pytest.raises(OSError, match="no space left"):
        save_model(make(1), FullDisk(), tmp_path / "model", "new")
    assert same(load_model(tmp_path / "model")[0], older)
    assert (tmp_path / "model" / "README.md").read_text("utf-8") == "old"


def test_a_folder_that_is_no_model_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is no model directory: it has no config.json"):
        load_model(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="missing is no model directory, nor a model on a hub"):
        load_model(tmp_path / "missing")


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_missing_or_cut_off_weights_are_named(name, tmp_path):
    save_model(make(), TOKENIZER, tmp_path / "model", "")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=name):
        load_model(tmp_path / "model")
    path.unlink()
    with pytest.raises(ValueError, match=name):
        load_model(tmp_path / "model")


def test_a_released_llm_that_was_trained_is_kept(tmp_path):
    base = make().config.llm
    llm = build_llm(base)
    llm.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    encoder, adapter = {"width": 16, "layers": 1, "heads": 2}, {"layers": 1, "heads": 2, "feed_forward": 24}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "out": str(tmp_path / "run"),
                "model": {
                    "kind": "new",
                    "llm": {"kind": "pretrained", "path": str(tmp_path / "base")},
                    "encoder": encoder,
                    "adapter": adapter,
                },
                "data": {"train": {"some": {"path": "some.jsonl"}}},
                "stages": [{"name": "all", "trainable": ["adapter"], "steps": 1, "learning_rate": 0.001}],
            }
        )
    )
    for trainable, kept in (("[adapter]", False), ("[adapter, llm]", True)):
        recipe = load_recipe([tmp_path / "recipe.yaml"], [f"stages.0.trainable={trainable}"])
        model, tokenizer = build(recipe, [])
        for name, parameter in model.named_parameters():
            if kept or not name.startswith("llm."):
                nn.init.normal_(parameter, std=0.3)
        save_model(model, tokenizer, tmp_path / "model", "")
        loaded, _ = load_model(tmp_path / "model")
        assert same(loaded, model)
        assert (loaded.config.llm_path is None) == kept

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from osum_npu.checkpoints import shards
from osum_npu.checkpoints.shards import read_weights, spooled, write_weights
from osum_npu.models.llm import build_llm

SIZES = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}


def equal(one, other):
    """Same names, shapes, dtypes and bits."""
    return one.keys() == other.keys() and all(
        (one[n].shape, one[n].dtype) == (other[n].shape, other[n].dtype)
        and torch.equal(shards.as_bytes(one[n]), shards.as_bytes(other[n]))
        for n in one
    )


@st.composite
def state_dicts(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, min_size=1, max_size=8))
    shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
    state = {}
    for name in names:
        dtype, shape = draw(st.sampled_from(list(shards.DTYPES))), draw(shapes)
        size = torch.empty(shape, dtype=dtype).nbytes
        content = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
        content = content % 2 if dtype is torch.bool else content
        state[name] = content.view(dtype).reshape(shape)
    return state


@settings(deadline=None, max_examples=60)
@given(state_dicts(), st.integers(1, 200))
def test_what_is_written_is_read_by_us_and_by_others(tmp_path_factory, state, limit):
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", limit)
        write_weights(folder, "model", state, state.__getitem__)
    assert equal(read_weights(folder), state)
    files = sorted(folder.glob("*.safetensors"))
    assert equal({name: tensor for file in files for name, tensor in load_file(file).items()}, state)
    for file in files:
        begins = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
        for name, entry in begins.items():
            if name != "__metadata__":
                assert entry["data_offsets"][0] % state[name].element_size() == 0


def test_transformers_reads_our_shards(tmp_path, monkeypatch):
    llm = build_llm(SIZES)
    llm.config.save_pretrained(tmp_path)
    monkeypatch.setattr(shards, "SHARD_BYTES", 3000)
    state = llm.state_dict()
    write_weights(tmp_path, "model", state, state.__getitem__)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert equal(dict(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()), dict(state))


def test_views_and_transposed_tensors_are_written_as_they_look(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    state = {"rows": whole[1:3], "columns": whole[:, 2:4], "turned": whole.t(), "twice": whole.expand(2, 4, 6)}
    write_weights(tmp_path, "model", state, state.__getitem__)
    assert equal(read_weights(tmp_path), state)


def test_older_files_of_the_same_name_are_gone(tmp_path, monkeypatch):
    first, second = {"a": torch.ones(9), "b": torch.ones(9)}, {"c": torch.zeros(2)}
    monkeypatch.setattr(shards, "SHARD_BYTES", 40)
    save_file(first, tmp_path / "other.safetensors")
    write_weights(tmp_path, "model", first, first.__getitem__)
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" not in names
    write_weights(tmp_path, "model", second, second.__getitem__)
    assert equal(read_weights(tmp_path), second)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "other.safetensors"}
    write_weights(tmp_path, "model", first, first.__getitem__)
    assert {path.name for path in tmp_path.iterdir()} == {*names, "other.safetensors"}


def test_a_computed_tensor_is_asked_for_once_and_not_kept(tmp_path):
    asked = []

    def read(name):
        asked.append(name)
        return torch.full((3,), float(len(asked)))

    like = {name: torch.empty(3, device="meta") for name in "abc"}
    with spooled(tmp_path, like, read) as state:
        assert {name: tensor[0].item() for name, tensor in state.items()} == {"a": 1, "b": 2, "c": 3}
    assert asked == ["a", "b", "c"]
    assert list(tmp_path.iterdir()) == []


def lose_everything(folder):
    for path in folder.iterdir():
        path.unlink()


def cut(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_shard(folder):
    (folder / "model-00001-of-00002.safetensors").unlink()


def spoil_the_index(folder):
    (folder / "model.safetensors.index.json").write_text("{", "utf-8")


def empty_the_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]", "utf-8")


def promise_more(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text("utf-8"))
    content["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize(
    "damage",
    [lose_everything, cut, lose_a_shard, spoil_the_index, empty_the_index, promise_more],
    ids=lambda f: f.__name__,
)
def test_missing_and_damaged_files_are_named(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 40)
    state = {"a": torch.ones(9), "b": torch.ones(9)}
    write_weights(tmp_path, "model", state, state.__getitem__)
    damage(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: model\.safetensors is missing or damaged: "):
        read_weights(tmp_path)

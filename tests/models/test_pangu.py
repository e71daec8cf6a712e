"""openPangu-Embedded folders as they are published, but small: configuration, weights, tokenizer, chat."""

import json
import random
import shutil

import pangu_folder
import pytest
import sentencepiece
import tiny
import torch
from pangu_folder import HAN, PUBLISHED, SIZES, TOKENIZER, plain, sentence
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from osum_npu.checkpoints.conversion import read_llm_config, read_tokenizer
from osum_npu.checkpoints.model_directory import load_model
from osum_npu.cli.main import main
from osum_npu.models.llm import build_llm, decode_packed, load_llm
from osum_npu.models.pangu import llama_config
from osum_npu.models.tokenizer import load_tokenizer
from osum_npu.parity import relative_error
from osum_npu.planning.sizes import llm_sizes
from osum_npu.training import loop

FORWARD = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pangu_folder.write(tmp_path_factory.mktemp("pangu") / "openPangu")


def changed(folder, target, **fields):
    """A copy whose configuration has other fields; None for none."""
    shutil.copytree(folder, target)
    config = {name: value for name, value in {**PUBLISHED, **fields}.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return str(target)


# -- the backbone


def formula(state, ids):
    """Logits of one sequence, written out: RMS norms, rotary halves, shared heads, biases on q, k, v and o."""
    heads, groups, layers = (SIZES[f"num_{name}"] for name in ("attention_heads", "key_value_heads", "hidden_layers"))
    width, length = SIZES["hidden_size"] // heads, len(ids)
    get = {name: tensor.double() for name, tensor in state.items()}.__getitem__

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * get(f"{name}.weight")

    def linear(x, name, bias=False):
        return x @ get(f"{name}.weight").T + (get(f"{name}.bias") if bias else 0)

    angle = torch.arange(length)[:, None] / 16000000.0 ** (torch.arange(0, width, 2).double() / width)

    def turn(x):
        one, other = x[..., : width // 2], x[..., width // 2 :]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)

    x = get("model.embed_tokens.weight")[ids]
    for i in range(layers):
        layer = f"model.layers.{i}"
        y = norm(x, f"{layer}.input_layernorm")
        query, key, value = (
            linear(y, f"{layer}.self_attn.{name}_proj", bias=True).view(length, -1, width) for name in "qkv"
        )
        key, value = (z.repeat_interleave(heads // groups, 1) for z in (turn(key), value))
        score = torch.einsum("qhd,khd->hqk", turn(query), key) / width**0.5
        score = score.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        y = torch.einsum("hqk,khd->qhd", score.softmax(-1), value).reshape(length, -1)
        x = x + linear(y, f"{layer}.self_attn.o_proj", bias=True)
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (linear(y, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        x = x + linear(gate * gate.sigmoid() * up, f"{layer}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


@torch.no_grad()
def test_logits_are_those_of_the_formula_alone_padded_and_packed(folder):
    llm = load_llm(str(folder)).eval()
    assert type(llm) is LlamaForCausalLM
    draw = torch.Generator().manual_seed(1)
    sequences = [torch.randint(SIZES["vocab_size"], (n,), generator=draw) for n in (17, 5, 1, 40)]
    want = [formula(plain().state_dict(), ids) for ids in sequences]
    for ids, logits in zip(sequences, want):
        assert relative_error(plain()(ids[None]).logits[0], logits) <= FORWARD  # both references agree
        assert relative_error(llm(ids[None]).logits[0], logits) <= FORWARD
    lengths = tuple(map(len, sequences))
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = decode_packed(llm, llm.get_input_embeddings()(torch.cat(sequences)[None]), places, lengths)
    assert relative_error(llm.lm_head(packed)[0], torch.cat(want)) <= FORWARD


@torch.no_grad()
def test_the_same_ids_as_plain_transformers(folder):
    ids = torch.arange(3, 14)[None]
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said, want = (llm.generate(ids, **settings) for llm in (load_llm(str(folder)).eval(), plain()))
    assert said.tolist() == want.tolist()


def test_configuration_is_that_of_a_llama(folder):
    for config in (read_llm_config(str(folder)), llm_sizes(str(folder))):
        assert (config["model_type"], config["attention_bias"], config["mlp_bias"]) == ("llama", True, False)
        assert config["rope_parameters"]["rope_theta"] == 16000000.0
        assert {name: config[name] for name in SIZES} == SIZES
        assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (0, 1, 13)
        assert not config.keys() & {"dtype", "torch_dtype", "auto_map", "bias"}
        assert build_llm(config).state_dict().keys() == plain().state_dict().keys()
    assert build_llm(PUBLISHED).config.to_dict() == build_llm(read_llm_config(str(folder))).config.to_dict()


def test_weights_keep_the_dtype_of_their_files(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "llm")
    plain().bfloat16().save_pretrained(tmp_path / "llm")
    (tmp_path / "llm" / "config.json").write_text(json.dumps(PUBLISHED), "utf-8")
    assert load_llm(str(tmp_path / "llm"), "auto").dtype is torch.bfloat16
    assert load_llm(str(tmp_path / "llm")).dtype is torch.float32


def test_fields_that_are_missing_are_named(folder, tmp_path):
    path = changed(folder, tmp_path / "llm", rope_theta=None, num_key_value_heads=None, bias=None)
    for read in (load_llm, read_llm_config, llm_sizes):
        with pytest.raises(ValueError, match=r"lacks num_key_value_heads, bias, rope_theta: .* model card"):
            read(path)
    assert llama_config(**PUBLISHED | {"rope_theta": None, "rope_parameters": {"rope_theta": 7}}).rope_parameters == {
        "rope_type": "default",
        "rope_theta": 7,
    }


@pytest.mark.parametrize("name", ["initializer_range", "pad_token_id", "torch_dtype", "hidden_act", "auto_map"])
def test_other_fields_may_be_missing(name, folder, tmp_path):
    llm = load_llm(changed(folder, tmp_path / "llm", **{name: None}))
    assert torch.equal(llm.lm_head.weight, plain().lm_head.weight)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "scales rotary positions by 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_would_compute_something_else_is_refused(fields, complaint, folder, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        load_llm(changed(folder, tmp_path / "llm", **fields))


@pytest.mark.parametrize("tensor", ["model.layers.1.self_attn.o_proj.bias", "model.embed_tokens.weight"])
def test_weights_that_are_missing_are_named(tensor, folder, tmp_path):
    path = changed(folder, tmp_path / "llm")
    state = load_file(f"{path}/model.safetensors")
    state["model.other"] = state.pop(tensor)
    save_file(state, f"{path}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lack 1 tensors of LlamaForCausalLM, among them {tensor}.*model\.other"):
        load_llm(path)


# -- the tokenizer


def test_ids_are_those_of_its_sentencepiece_model(folder):
    tokenizer, their = load_tokenizer(str(folder)), sentencepiece.SentencePieceProcessor(f"{folder}/tokenizer.model")
    draw = random.Random(3)
    for text in [sentence(draw) for _ in range(300)]:
        assert tokenizer(text, add_special_tokens=False).input_ids == their.encode(text)
        assert tokenizer(text).input_ids == [1, *their.encode(text)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == their.decode(their.encode(text))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 13)
    assert tokenizer.get_vocab() == read_tokenizer(str(folder)).get_vocab()


CHAT = [{"role": "system", "content": "你是助手"}, {"role": "user", "content": "今天天气"}]
BEGINNING = "[unused9]系统：你是助手[unused10][unused9]用户：今天天气"


@pytest.mark.parametrize(
    ("messages", "settings", "text"),
    [
        (CHAT, {}, BEGINNING + "[unused10][unused9]助手："),
        (CHAT, {"thinking": "no_think"}, BEGINNING + " /no_think[unused10][unused9]助手："),
        (CHAT, {"thinking": "auto_think"}, BEGINNING + " /auto_think[unused10][unused9]助手："),
        (CHAT, {"add_generation_prompt": False}, BEGINNING + "[unused10]"),
        (CHAT[1:], {}, "[unused9]系统：[unused10][unused9]用户：今天天气[unused10][unused9]助手："),
        (
            [*CHAT, {"role": "assistant", "content": "很好"}, {"role": "user", "content": "好"}],
            {"thinking": "no_think"},
            BEGINNING + "[unused10][unused9]助手：很好[unused10][unused9]用户：好 /no_think[unused10][unused9]助手：",
        ),
    ],
)
def test_its_own_chat(messages, settings, text, folder, tmp_path):
    load_tokenizer(str(folder)).save_pretrained(tmp_path)
    for tokenizer in (
        load_tokenizer(str(folder)),
        load_tokenizer(str(tmp_path)),
        AutoTokenizer.from_pretrained(tmp_path),
    ):
        settings = {"add_generation_prompt": True, **settings}
        assert tokenizer.apply_chat_template(messages, tokenize=False, **settings) == text
        ids = tokenizer(text).input_ids
        assert ids[0] == 1
        marks = [i for i in ids if 3 <= i < 33]
        assert marks == [3 + int(number.split("]")[0]) for number in text.split("[unused")[1:]]
        assert tokenizer.apply_chat_template(messages, return_dict=False, **settings) == ids[1:]


@pytest.mark.parametrize(("role", "thinking"), [("judge", "no_think"), ("user", "never")])
def test_a_chat_that_it_does_not_have_is_refused(role, thinking, folder):
    with pytest.raises(Exception, match=r"no role is called judge|thinking is no_think or auto_think"):
        load_tokenizer(str(folder)).apply_chat_template([{"role": role, "content": "a"}], thinking=thinking)


def test_tokenizer_settings_are_heeded(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "llm")
    more = {
        "eos_token": {"content": "</s>", "special": True},
        "add_bos_token": False,
        "chat_template": "{{ messages[0]['content'] }}",
        "added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "700": {"content": "<mark>"}},
    }
    path = tmp_path / "llm" / "tokenizer_config.json"
    path.write_text(json.dumps({**TOKENIZER, **more}), "utf-8")
    tokenizer = load_tokenizer(str(tmp_path / "llm"))
    assert (tokenizer.eos_token_id, tokenizer("今<mark>").input_ids[-1]) == (2, 700)
    assert tokenizer("今").input_ids[0] != 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
    path.write_text(json.dumps({**TOKENIZER, "added_tokens_decoder": {"5": {"content": "<s>"}}}), "utf-8")
    with pytest.raises(ValueError, match=r"'<s>' has the id 5 in tokenizer_config\.json and 1 in tokenizer\.model"):
        load_tokenizer(str(tmp_path / "llm"))
    path.write_text(json.dumps({**TOKENIZER, "eos_token": "[end]"}), "utf-8")
    with pytest.raises(ValueError, match=r"no piece for eos_token '\[end\]'"):
        load_tokenizer(str(tmp_path / "llm"))
    (tmp_path / "llm" / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(str(tmp_path / "llm"))


# -- recipes and plans


TUNE = (
    "stages=[{name: a, trainable: [adapter, lora], steps: 2, learning_rate: 1e-3, batch_seconds: 6, tasks: {asr: 1}}]"
)


def test_a_recipe_trains_on_it(folder, corpus, tmp_path):
    llm = f"model.llm={{kind: pretrained, path: {folder}}}"
    loop.train(tiny.recipe(corpus, tmp_path / "run", "model.ctc=false", llm, TUNE))
    model, tokenizer = load_model(tmp_path / "run" / "model")
    assert (model.config.llm_path, type(model.llm)) == (str(folder), LlamaForCausalLM)
    projection = model.llm.model.layers[0].self_attn.o_proj.base_layer
    assert torch.equal(projection.bias, plain().model.layers[0].self_attn.o_proj.bias)
    assert tokenizer(HAN).input_ids == load_tokenizer(str(folder))(HAN).input_ids
    assert tokenizer.eos_token == "[unused10]"
    words = [str(tmp_path / "run.yaml"), llm, TUNE, "--device", "h200", "--utterance-seconds", "2"]
    assert main(["plan", *words]) == 0
    words = ["--model", str(tmp_path / "run" / "model"), "--tasks", "asr", str(corpus / "dev" / "000.wav")]
    assert main(["infer", *words]) == 0


def test_released_sizes_are_those_of_the_card():
    with torch.device("meta"):
        llm = build_llm(llm_sizes("FreedomIntelligence/openPangu-Embedded-7B-V1.1"))
    assert llm.num_parameters() == pytest.approx(8.0e9, rel=0.01)
    names = set(llm.state_dict())
    assert "model.layers.33.self_attn.o_proj.bias" in names
    assert not any("mlp" in name and "bias" in name for name in names)

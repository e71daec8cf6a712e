"""A small folder of openPangu-Embedded as it is published, with code that must not be run."""

import io
import json
import random

import sentencepiece
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "hello",
    "world",
    "speech",
    "tell",
    "used",
    "un",
]
HAN = "今天气很好请转录这段音频并告诉我说话人的年龄和性别情绪风格时间戳你是语助手系统用户"
MARKS = [f"[unused{i}]" for i in range(30)]


def sentence(draw):
    parts = []
    for _ in range(draw.randint(3, 12)):
        han, number = "".join(draw.choices(HAN, k=draw.randint(1, 5))), str(draw.randint(0, 999))
        parts.append(draw.choice([draw.choice(WORDS), han, number, draw.choice("，。！？,.!?<>[]{}:;-_")]))
    return draw.choice([" ", ""]).join(parts)


def train(kind, **options):
    """A model file of the library's own training."""
    draw, content = random.Random(0), io.BytesIO()
    settings = {"byte_fallback": True, "normalization_rule_name": "identity", **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence(draw) for _ in range(2000)]),
        model_writer=content,
        model_type=kind,
        vocab_size=700,
        user_defined_symbols=MARKS,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return content.getvalue()


SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 704,
    "max_position_embeddings": 256,
}
PUBLISHED = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
        "AutoModel": "modeling_openpangu_dense.PanguEmbeddedModel",
        "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
    },
    "model_type": "PanguEmbedded",
    "bias": True,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "rope_theta": 16000000.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 13,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.2",
    "use_cache": True,
    **SIZES,
}
TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]},
    "bos_token": "<s>",
    "eos_token": "[unused10]",
    "pad_token": "<unk>",
    "unk_token": "<unk>",
    "tokenizer_class": "PanguTokenizer",
}
TRAP = "raise RuntimeError('code of the folder was run')\n"


def plain():
    """The same model by transformers alone, its values by chance."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=False, rms_norm_eps=1e-5, rope_theta=16000000.0, eos_token_id=13
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        deviation = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, mean=float(norm), std=0.3 if "embed" in name else deviation)
    return model


def write(folder):
    """Configuration, weights, tokenizer, and a trap in place of the code."""
    plain().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(PUBLISHED), "utf-8")
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.model").write_bytes(train("bpe"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER), "utf-8")
    for name in ("configuration_openpangu_dense", "modeling_openpangu_dense", "tokenization_openpangu"):
        (folder / f"{name}.py").write_text(TRAP, "utf-8")
    return folder

"""A small model with loud weights, so that what it says depends on what it hears, and on what it is asked."""

import torch
from torch import nn

from osum_npu.models.adapters import OsumAdapterConfig
from osum_npu.models.speech_llm import SpeechLLM, make_config
from osum_npu.models.tokenizer import train_tokenizer
from osum_npu.models.whisper import WhisperEncoderConfig

TEXTS = ["one two three four five six seven eight nine ten", "red green blue", "north south east west", "今天天气很好"]
TOKENIZER = train_tokenizer(TEXTS * 2, ["<male>", "<female>", "<0.10>", "<0.42>"], 380)
LONGEST = 2.0


def make():
    torch.manual_seed(0)
    llm = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(TOKENIZER),
        "tie_word_embeddings": False,
    }
    encoder = WhisperEncoderConfig(width=32, layers=1, heads=2, max_frames=round(50 * LONGEST))
    adapter = OsumAdapterConfig(layers=1, heads=2, feed_forward=48, max_positions=30)
    model = SpeechLLM(make_config(encoder, adapter, llm, None))
    torch.manual_seed(0)  # once more, so that these weights do not hang on what the constructors drew
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        deviation = 0.1 if parameter.ndim == 1 else 1.5 * parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, mean=float(norm), std=deviation)
    with torch.no_grad():
        model.llm.lm_head.weight[TOKENIZER.eos_token_id] *= 2  # some answers end early
    return model

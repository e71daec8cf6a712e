"""openPangu-Embedded as a backbone, without the code that comes with it: a Llama with biases in its attention.

Its own code runs on one kind of device and with old versions of transformers alone. Sources: configuration and model
card of openPangu-Embedded-7B-V1.1; the chat also ggml-org/llama.cpp, src/llama-chat.cpp.
"""

from __future__ import annotations

from typing import Any

MODEL_TYPE = "PanguEmbedded"
"""What its ``config.json`` calls it."""
TOKENIZER_CLASS = "PanguTokenizer"
"""What its ``tokenizer_config.json`` calls its tokenizer, a SentencePiece model."""

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "bias",
)
_OPTIONAL = (
    "hidden_act",
    "head_dim",
    "initializer_range",
    "attention_dropout",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
    "dtype",
    "torch_dtype",
)

CHAT_TEMPLATE = """\
{%- set names = {'system': '系统', 'user': '用户', 'assistant': '助手', 'tool': '工具', 'function': '方法'} -%}
{%- if thinking is defined and thinking not in ('no_think', 'auto_think') -%}
{{- raise_exception("thinking is no_think or auto_think, or left out") -}}
{%- endif -%}
{%- if messages[0]['role'] != 'system' -%}{{- '[unused9]系统：[unused10]' -}}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] not in names -%}{{- raise_exception('no role is called ' ~ message['role']) -}}{%- endif -%}
{{- '[unused9]' ~ names[message['role']] ~ '：' ~ message['content'] -}}
{%- if loop.last and message['role'] == 'user' and thinking is defined -%}{{- ' /' ~ thinking -}}{%- endif -%}
{{- '[unused10]' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[unused9]助手：' -}}{%- endif -%}
"""
"""Its own chat, for text alone: OSUM-Pangu's models are not asked in this form.

The tokenizer puts the begin mark in front of such a text, the template does not. ``thinking="no_think"`` or
``"auto_think"`` is written behind the last message; without it the model thinks, between ``[unused16]`` and
``[unused17]``.
"""


def llama_config(**fields: Any) -> Any:
    """Return the ``transformers.LlamaConfig`` of a model whose ``config.json`` holds these fields.

    Raises:
        ValueError: a field that decides about its numbers is missing, or says what is not known here.
    """
    from transformers import LlamaConfig

    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = fields.get("rope_theta") or rope.get("rope_theta")
    missing = [name for name in _REQUIRED if fields.get(name) is None] + (["rope_theta"] if theta is None else [])
    if missing:
        raise ValueError(
            f"its config.json lacks {', '.join(missing)}: openPangu has no usual values that could stand in for them; "
            "take them from the model card, or from the code that comes with the model"
        )
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ValueError(f"its config.json scales rotary positions by {kind!r}: wanted openPangu's, which are plain")
    if (activation := fields.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"its config.json has hidden_act {activation!r}: wanted openPangu's 'silu'")
    kept = {name: fields[name] for name in (*_REQUIRED, *_OPTIONAL) if name in fields}
    return LlamaConfig(
        attention_bias=kept.pop("bias"),
        mlp_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        **kept,
    )


def load_tokenizer(name_or_path: str, settings: dict[str, Any]) -> Any:
    """Make its tokenizer, a fast one, from ``tokenizer.model``; see :mod:`osum_npu.models.sentencepiece`.

    Args:
        name_or_path: folder, or name on a hub.
        settings: of its ``tokenizer_config.json``.

    Returns:
        A ``transformers.PreTrainedTokenizerFast``. Its end mark is ``[unused10]``, unless the settings say otherwise.

    Raises:
        ValueError: there is no model file, it cannot be read, or the settings do not fit it.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    from osum_npu.models.sentencepiece import convert, read_model

    try:
        path = cached_file(name_or_path, "tokenizer.model")
    except OSError as error:
        raise ValueError(f"{name_or_path} has neither tokenizer.json nor tokenizer.model: {error}") from error
    tokenizer = convert(read_model(path))
    for place, token in sorted((settings.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        tokenizer.add_tokens([AddedToken(**{"normalized": False, **token})])
        if (own := tokenizer.token_to_id(token["content"])) != int(place):
            raise ValueError(
                f"{name_or_path}: {token['content']!r} has the id {place} in tokenizer_config.json and {own} in "
                "tokenizer.model; do the two files belong together?"
            )
    named = {"bos_token": "<s>", "eos_token": "[unused10]", "unk_token": "<unk>", "pad_token": "<unk>"}
    for name in named:
        if given := settings.get(name):
            named[name] = given["content"] if isinstance(given, dict) else given
    if lacking := [f"{name} {text!r}" for name, text in named.items() if tokenizer.token_to_id(text) is None]:
        raise ValueError(f"{name_or_path}: tokenizer.model has no piece for {', '.join(lacking)}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        clean_up_tokenization_spaces=False,
        chat_template=settings.get("chat_template") or CHAT_TEMPLATE,
    )

"""A model and its tokenizer from a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from osum_npu.checkpoints.model_directory import load_model
from osum_npu.checkpoints.whisper import load_encoder
from osum_npu.config import NewModel, PretrainedLLM, RandomLLM, Recipe, SavedModel, WhisperModel
from osum_npu.models.llm import check_output_layer, load_llm
from osum_npu.models.lora import add_lora
from osum_npu.models.speech_llm import SpeechLLM, lora_fields, make_config
from osum_npu.models.tokenizer import load_tokenizer, train_tokenizer
from osum_npu.models.whisper import Block
from osum_npu.models.whisper_encoder_decoder import START_MARKS, WhisperEncoderDecoder
from osum_npu.tasks import (
    TASKS,
    Utterance,
    get_task,
    normalize_text,
    read_prompts,
    split_words,
    wordings_of,
)
from osum_npu.tasks.answer import marks, stamp
from osum_npu.tasks.form import Form, get_form
from osum_npu.training.held import hold, llm_learns

_CTC_WORDS = 1000
"""How many words have a class of their own at most; a whole word aligns sooner than its letters."""
_CTC_WORD_COUNT = 20
"""How often a word must occur for that."""

Trainee = SpeechLLM | WhisperEncoderDecoder
"""What a recipe can train."""


def build(recipe: Recipe, utterances: Sequence[Utterance], dtype: torch.dtype = torch.float32) -> tuple[Trainee, Any]:
    """Build or load what ``recipe.model`` describes, on the CPU, with the recipe's seed.

    Weights are float32, but for the matrices of an LLM that no stage trains (:func:`osum_npu.training.held.hold`).

    Args:
        recipe: of the run.
        utterances: of the training data: a new tokenizer and the CTC head learn their units from it.
        dtype: of the computation.

    Raises:
        ValueError: something of it cannot be loaded, does not fit, or cannot be trained.
    """
    torch.manual_seed(recipe.seed)
    model: Trainee
    if isinstance(recipe.model, WhisperModel):
        model, tokenizer = _whisper(recipe, recipe.model, utterances)
    else:
        llm_dtype = torch.float32 if llm_learns(recipe.stages) else dtype
        model, tokenizer = _speech_llm(recipe, recipe.model, utterances, llm_dtype)
        check_output_layer(model.llm)
        hold(model, llm_dtype)
    if recipe.activation_checkpointing:
        checkpoint_activations(model)
    return model, tokenizer


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the inputs of transformer blocks for the backward pass, in place; what is within is computed again."""
    for module in model.modules():
        if isinstance(module, Block | GradientCheckpointingLayer):
            # by its forward, since the model's own ops have replaced that of transformers, which would do the same
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


def _whisper(
    recipe: Recipe, settings: WhisperModel, utterances: Sequence[Utterance]
) -> tuple[WhisperEncoderDecoder, Any]:
    """Build or load a whole Whisper."""
    from transformers import AutoTokenizer, WhisperConfig

    if settings.path is not None:
        model = WhisperEncoderDecoder.from_pretrained(settings.path, settings.dropout)
        return model, AutoTokenizer.from_pretrained(settings.path)
    llm = RandomLLM(kind="random", config={})
    tokenizer = new_tokenizer(llm, utterances, _wordings(recipe), recipe.stamp_seconds)
    tokenizer.add_tokens(list(START_MARKS), special_tokens=True)
    end, sizes = tokenizer.eos_token_id, settings.config or {}
    own = {
        "vocab_size": len(tokenizer),
        "decoder_start_token_id": tokenizer.convert_tokens_to_ids(START_MARKS[0]),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
        "begin_suppress_tokens": None,
    }
    return WhisperEncoderDecoder(WhisperConfig(**{**sizes, **own}), settings.dropout), tokenizer


def _speech_llm(
    recipe: Recipe, settings: NewModel | SavedModel, utterances: Sequence[Utterance], llm_dtype: torch.dtype
) -> tuple[SpeechLLM, Any]:
    """Build or load encoder, adapter and LLM; the LLM may come in the dtype of its files instead of a narrower one."""
    loaded_dtype: Any = torch.float32 if llm_dtype is torch.float32 else "auto"
    if isinstance(settings, SavedModel):
        model, tokenizer = load_model(settings.path, llm_dtype=loaded_dtype)
        if settings.lora is not None and model.config.lora is None:
            add_lora(model.llm, settings.lora)
            model.config.lora = lora_fields(settings.lora)
        return _own_llm(model, recipe), tokenizer
    llm_config, llm_path, llm = {}, None, None
    if isinstance(settings.llm, PretrainedLLM):
        llm_path, tokenizer = settings.llm.path, load_tokenizer(settings.llm.path)
        llm = load_llm(llm_path, loaded_dtype)
    else:
        form = get_form(settings.form)
        tokenizer = new_tokenizer(settings.llm, utterances, _wordings(recipe), recipe.stamp_seconds, form)
        end = tokenizer.eos_token_id
        own = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
        llm_config = {**settings.llm.config, **own}
    config = make_config(
        settings.encoder,
        settings.adapter,
        llm_config,
        settings.lora,
        ctc_units=spelling_units(utterances) if settings.ctc else None,
        llm_path=llm_path,
        form=settings.form,
        begin_of_text=settings.begin_of_text,
    )
    model = SpeechLLM(config, llm)
    if settings.encoder_weights is not None:
        load_encoder(model.encoder, settings.encoder_weights)
    return _own_llm(model, recipe), tokenizer


def _own_llm(model: SpeechLLM, recipe: Recipe) -> SpeechLLM:
    """Keep the LLM in the model directory where a stage trains it: it will not be that of ``llm_path`` any more."""
    if model.config.llm_path is not None and llm_learns(recipe.stages):
        model.config.llm, model.config.llm_path = model.llm.config.to_dict(), None
    return model


def spelling_units(utterances: Iterable[Utterance]) -> list[str]:
    """List what the CTC head tells apart: labels, all characters of the transcripts, their most frequent words."""
    utterances = list(utterances)
    marks = {f"<{label}>".lower() for u in utterances for label in u.labels.values()}
    words = Counter(word for u in utterances for word in split_words(normalize_text(u.text or "")))
    characters = {character for word in words for character in word}
    frequent = {word for word, count in words.most_common(_CTC_WORDS) if count >= _CTC_WORD_COUNT}
    return sorted(characters | frequent | marks)


def _wordings(recipe: Recipe) -> list[str]:
    """List the instructions of the eight tasks and of all others that the recipe trains."""
    wordings, _ = read_prompts(recipe.prompts)
    trained = [name for stage in recipe.stages for name in stage.tasks]
    asked = map(get_task, dict.fromkeys([*TASKS, *trained]))
    return [wording for task in asked for wording in wordings_of(task, wordings)]


def new_tokenizer(
    settings: RandomLLM,
    utterances: Iterable[Utterance],
    wordings: Iterable[str],
    stamp_seconds: float,
    form: Form | None = None,
) -> Any:
    """Learn a tokenizer from transcripts, replies and instructions.

    Labels, time stamps and tags are one token each, and so are the fixed texts of the form: every question carries
    them, they are longer than all else in it, and a model from random weights knows none of their words.
    """
    texts = [text for u in utterances for text in (u.text, u.reply, u.prompt, u.thought) if text]
    texts += wordings
    count = round(settings.longest_stamp / stamp_seconds) + 1
    stamps = [stamp(i * stamp_seconds, stamp_seconds) for i in range(count)]
    fixed = form.texts if form else []
    prefix = form.prefix if form else False
    return train_tokenizer(texts, [*marks(prefix=prefix), *stamps, *fixed], settings.vocabulary)

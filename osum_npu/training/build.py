"""A model and its tokenizer from a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from osum_npu.checkpoints.model_directory import load_model
from osum_npu.checkpoints.whisper import load_encoder
from osum_npu.config import NewModel, PretrainedLLM, RandomLLM, Recipe
from osum_npu.models.llm import load_llm
from osum_npu.models.lora import add_lora
from osum_npu.models.speech_llm import SpeechLLM, lora_fields, make_config
from osum_npu.models.tokenizer import load_tokenizer, train_tokenizer
from osum_npu.tasks import CHAT_SEPARATOR, TASKS, Utterance, normalize_text, read_prompts, split_words
from osum_npu.tasks.answer import stamp

_CTC_WORDS = 1000
"""How many words have a class of their own at most; a whole word aligns sooner than its letters."""
_CTC_WORD_COUNT = 20
"""How often a word must occur for that."""


def build(recipe: Recipe, utterances: Sequence[Utterance]) -> tuple[SpeechLLM, Any]:
    """Build or load what ``recipe.model`` describes, on the CPU, with the recipe's seed.

    Args:
        recipe: of the run.
        utterances: of the training data: a new tokenizer and the CTC head learn their units from it.
    """
    torch.manual_seed(recipe.seed)
    settings = recipe.model
    if not isinstance(settings, NewModel):
        model, tokenizer = load_model(settings.path)
        if settings.lora is not None and model.config.lora is None:
            add_lora(model.llm, settings.lora)
            model.config.lora = lora_fields(settings.lora)
        return _own_llm(model, recipe), tokenizer
    llm_config, llm_path, llm = {}, None, None
    if isinstance(settings.llm, PretrainedLLM):
        llm_path, tokenizer = settings.llm.path, load_tokenizer(settings.llm.path)
        llm = load_llm(llm_path)
    else:
        tokenizer = new_tokenizer(settings.llm, utterances, _wordings(recipe), recipe.stamp_seconds)
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
    )
    model = SpeechLLM(config, llm)
    if settings.encoder_weights is not None:
        load_encoder(model.encoder, settings.encoder_weights)
    return _own_llm(model, recipe), tokenizer


def _own_llm(model: SpeechLLM, recipe: Recipe) -> SpeechLLM:
    """Keep the LLM in the model directory where a stage trains it: it will not be that of ``llm_path`` any more."""
    if model.config.llm_path is not None and any("llm" in stage.trainable for stage in recipe.stages):
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
    return [wording for name in dict.fromkeys([*TASKS, *trained]) for wording in wordings[name]]


def new_tokenizer(
    settings: RandomLLM, utterances: Iterable[Utterance], wordings: Iterable[str], stamp_seconds: float
) -> Any:
    """Learn a tokenizer from transcripts, replies and instructions; labels and time stamps are one token each."""
    texts = [text for u in utterances for text in (u.text, u.reply, u.prompt) if text]
    texts += wordings
    labels = [f"<{label}>" for task in TASKS.values() for label in task.labels]
    count = round(settings.longest_stamp / stamp_seconds) + 1
    stamps = [stamp(i * stamp_seconds, stamp_seconds) for i in range(count)]
    return train_tokenizer(texts, [*dict.fromkeys(labels), CHAT_SEPARATOR, *stamps], settings.vocabulary)

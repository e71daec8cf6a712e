"""A corpus of tones and a recipe that trains on it within a second."""

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import launching
import numpy as np
import soundfile
import torch

from osum_npu.config import load_recipe
from osum_npu.data.manifest import read_manifest, write_manifest
from osum_npu.tasks import TASKS, Utterance, Word
from osum_npu.training.log import read_log

RATE = 16000
TONES = {"do": 262, "re": 294, "mi": 330, "fa": 349, "so": 392, "la": 440, "好": 494, "天": 523}
"""A word is a tone of this frequency; gender decides its overtones."""

RECIPE = """\
out: nowhere
precision: float32
log_every: 1
checkpoint_every: 3
dev_every: 4
model:
  kind: new
  ctc: true
  encoder: {width: 32, layers: 1, heads: 2, max_frames: 200, dropout: 0.1}
  adapter: {layers: 1, heads: 2, feed_forward: 64, dropout: 0.1}
  lora: {rank: 2, alpha: 4, dropout: 0.1}
  llm:
    kind: random
    vocabulary: 400
    longest_stamp: 2.0
    config:
      model_type: qwen2
      hidden_size: 32
      intermediate_size: 64
      num_hidden_layers: 2
      num_attention_heads: 2
      num_key_value_heads: 1
      max_position_embeddings: 256
data:
  train: {tones: {path: train.jsonl, weight: 1.5}}
  dev: {tones: {path: dev.jsonl}}
  max_seconds: 3
  workers: 0
stages:
  - name: hear
    trainable: [encoder, ctc]
    steps: 4
    learning_rate: 3.0e-3
    batch_seconds: 12
    llm_weight: 0
    ctc_weight: 1
  - name: understand
    trainable: [encoder, ctc, adapter, llm]
    steps: 8
    learning_rate: 3.0e-3
    warmup_steps: 2
    batch_seconds: 12
    micro_batch_seconds: 6
    ctc_weight: 0.3
    spec_augment: {time_frames: 10}
    tasks: {asr: 1, timestamps: 1, gender: 1, emotion: 1, chat: 1}
  - name: tune
    trainable: [lora]
    steps: 2
    learning_rate: 1.0e-3
    batch_seconds: 12
    tasks: {asr: 1, gender: 1}
"""


def write_corpus(manifest, count, seed=0):
    """Write ``count`` utterances of two or three tones beside ``manifest``; every label occurs."""
    rng = np.random.default_rng(seed)
    folder = manifest.parent / manifest.stem
    folder.mkdir()
    utterances = []
    for i in range(count):
        said = [str(word) for word in rng.choice(list(TONES), int(rng.integers(2, 4)))]
        gender = ("female", "male")[i % 2]
        parts, words, place = [silence(0.05)], [], 0.05
        for word in said:
            seconds = float(rng.integers(16, 28)) / 100
            time = np.arange(round(seconds * RATE)) / RATE
            overtones = range(1, 4 if gender == "male" else 2)
            parts += [sum(np.sin(2 * np.pi * TONES[word] * k * time) / k for k in overtones) / 4, silence(0.04)]
            words.append(Word(word, round(place, 4), round(place + seconds, 4)))
            place += seconds + 0.04
        wave = np.concatenate(parts) + 0.003 * rng.standard_normal(sum(map(len, parts)))
        path = folder / f"{i:03d}.wav"
        soundfile.write(path, wave, RATE)
        utterances.append(
            Utterance(
                key=f"{manifest.stem}_{i:03d}",
                wav=str(path),
                duration=len(wave) / RATE,
                text=" ".join(said).replace(" 好", "好").replace("好 ", "好").replace(" 天", "天").replace("天 ", "天"),
                words=tuple(words),
                labels={"gender": gender, **{t.name: t.labels[i % len(t.labels)] for t in TASKS.values() if t.labels}}
                | {"gender": gender},
                reply=said[-1] if i % 3 == 0 else None,
            )
        )
    write_manifest(manifest, utterances)


def write_dialogues(manifest, corpus, seed=0):
    """Write the rows of ``corpus``, every other with a thought, and half as many rows about text alone."""
    rng = np.random.default_rng(seed)
    heard = [
        replace(u, thought=f"heard {u.text}" if i % 2 else None) for i, u in enumerate(read_manifest(corpus).utterances)
    ]
    texts = []
    for i in range(len(heard) // 2):
        said = " ".join(rng.choice([word for word in TONES if word.isascii()], int(rng.integers(1, 12))))
        asked = ("how old is the speaker?", "gender and emotion, please")[i // 2 % 2]
        fields = {"prompt": f"{said}: {asked}", "intent": ("age", "gender+emotion-only")[i // 2 % 2]}
        if i % 2:
            fields = {"prompt": f"say the last of {said}", "reply": said.split()[-1]}
        texts.append(Utterance(key=f"text_{manifest.stem}_{i:03d}", wav=None, **fields))
    write_manifest(manifest, [*heard, *texts])
    return manifest


def silence(seconds):
    return np.zeros(round(seconds * RATE))


WHISPER_SIZES = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "max_source_positions": 200,
    "max_target_positions": 128,
}
"""A Whisper of transformers that hears 4 s."""


def write_whisper(folder):
    """Write a Whisper as transformers does: random weights, its real tokenizer with bytes as the only units."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    tokenizer = WhisperTokenizer(vocab={unit: i for i, unit in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    names = ["startoftranscript", *LANGUAGES, "translate", "transcribe", "startoflm", "startofprev", "nospeech"]
    tokenizer.add_tokens([f"<|{name}|>" for name in [*names, "notimestamps"]], special_tokens=True)
    end = tokenizer.eos_token_id
    config = WhisperConfig(
        **WHISPER_SIZES,
        vocab_size=len(tokenizer),
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
        suppress_tokens=tokenizer("<>").input_ids[-3:-1],
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=4).save_pretrained(folder)
    return folder


def write_recipe(path, corpus):
    path.write_text(RECIPE.replace("path: ", f"path: {corpus}/"), "utf-8")
    return path


def recipe(corpus, out, *overrides):
    """The tiny recipe with changes ``dotted.key=value``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    layer = write_recipe(out.with_name(f"{out.name}.yaml"), corpus)
    return load_recipe([layer], [f"out={out}", *overrides])


@contextmanager
def one_thread():
    """Compute in one thread, as a process started by :func:`osum_npu` does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


WITHOUT_CHANCE = (
    "model.encoder.dropout=0.0",
    "model.adapter.dropout=0.0",
    "model.lora.dropout=0.0",
    "stages.1.spec_augment=null",
)
"""Overrides of the tiny recipe after which a training draws no random numbers, whose order differs by device."""


def torchrun(recipe, *changes, processes, env=None):
    """Train in several processes by ``scripts/torchrun_train.sh``, which meet on a free port of this machine."""
    words = [f"--devices={processes}", f"--port={launching.free_port()}", "--", *map(str, changes)]
    launch = launching.Launch("torchrun_train.sh", recipe, *words, cwd=Path(recipe).parent, env=env)
    status, output = launch.end()
    return subprocess.CompletedProcess(launch.process.args, status, output)


def python(*words, env=None):
    """Run Python in a process of its own."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=variables)


def osum_npu(*words, start=False, env=None):
    """Run the command line in a process of its own: its result, or the process itself with ``start``."""
    call = [sys.executable, "-m", "osum_npu", *map(str, words)]
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1", "OSUM_BACKEND": "cpu", **(env or {})}, "text": True}
    if start:
        return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    return subprocess.run(call, capture_output=True, **options)


def rows(out):
    """The steps that a run logged."""
    return [row for row in read_log(out / "log.jsonl") if "learning_rate" in row]

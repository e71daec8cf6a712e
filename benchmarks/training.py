"""A training step of this project against padded ones: sound by second, memory, and how much of the machine is used.

    OMP_NUM_THREADS=1 python benchmarks/training.py FOLDER [--json FILE] [--rounds 5]

FOLDER holds a `train.jsonl` with transcripts, such as speechocean762. The model: encoder 384 × 6, the adapter of OSUM,
a frozen Qwen2 of 512 × 8 with the real vocabulary, LoRA. Encoder, adapter and LoRA learn by AdamW from utterances of 2
to 8 s. A step goes from samples to the update. The sides take turns, in one process and one thread, on the same
batches: utterances in random order, as MooER has them, and as packing allows; besides, in batches of similar lengths,
as OSUM sorts them to pad less.

    ours              packed, logits at labels alone
    padded            as the reference systems do it; see padded_reference.py
    Qwen2-Audio       transformers' class at equal sizes; its encoder hears 30 s of every utterance

Before anything is timed, ours and padded must give the same loss. Memory is measured in a process for each side: the
peak over the loaded weights. gemm_share: floating-point operations that the model needs (osum_npu/models/flops.py:
encoder, adapter, frozen LLM forward and its gradient to the input, LoRA, logits of labels) by CPU second, over those of
a large matrix product, the ceiling, which is timed between the rounds. Where the ceiling moves by more than a tenth in
the course of a race, the race is void and run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from padded_reference import PaddedReference
from torch import Tensor, nn
from tqdm import tqdm

from osum_npu import backend
from osum_npu.audio.mel import frame_count, log_mel
from osum_npu.config import Stage
from osum_npu.data.collate import Batch, Collator
from osum_npu.data.plan import WeightedSource, cut, plan_epoch
from osum_npu.data.sources import read_source
from osum_npu.models.adapters import OsumAdapterConfig
from osum_npu.models.flops import Work, count_flops
from osum_npu.models.layout import lay_out
from osum_npu.models.lora import LoraSettings, add_lora
from osum_npu.models.speech_llm import SpeechLLM, make_config
from osum_npu.models.tokenizer import train_tokenizer
from osum_npu.models.whisper import WhisperEncoderConfig
from osum_npu.training.optimizer import Optimizers, freeze

VOCABULARY, SMALL_VOCABULARY = 151_936, 4_096
BATCH_SECONDS = 60.0
STEPS = 1
"""Steps of a side in a round."""
STAGE = Stage(name="bench", trainable=["encoder", "adapter", "lora"], steps=1, learning_rate=1e-4)
GEMM = 1536
"""Side of the matrices whose product is the machine's ceiling."""
PRODUCTS = 125
"""Their median is the ceiling: ten seconds, over which a neighbour's bursts even out."""
STEADY = 0.1
"""A race is void whose ceiling moves by more."""
ATTEMPTS = 4
"""A void race is thrown away and run again; so often it is run at most."""


def read_batches(folder: Path, count: int, *, similar: bool) -> list[Batch]:
    """Return batches of real utterances, in random order or of similar lengths; their texts make the tokenizer."""
    utterances, _ = read_source(folder / "train.jsonl", 8.0)
    chosen = [u for u in utterances if u.text and 2.0 <= (u.duration or 0.0) <= 8.0]
    tokenizer = train_tokenizer([u.text for u in chosen if u.text], [], SMALL_VOCABULARY)
    steps = plan_epoch([WeightedSource(chosen)], {"asr": 1.0}, batch_seconds=BATCH_SECONDS, seed=0, epoch=0)
    if similar:
        examples = sorted((e for step in steps for e in step), key=lambda e: -(e.utterance.duration or 0.0))
        steps = cut(examples, BATCH_SECONDS)
        random.Random(0).shuffle(steps)
    collate = Collator(tokenizer=tokenizer, n_mels=80, seed=0, spec_augment=None, max_seconds=8.0)
    return [collate(step, 0) for step in random.Random(0).sample(steps, count)]


def make_model(vocabulary: int) -> SpeechLLM:
    """Build the bench model; its LLM is frozen."""
    torch.manual_seed(0)
    llm = {
        "model_type": "qwen2",
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    encoder = WhisperEncoderConfig(width=384, layers=6, heads=6, max_frames=1500)
    return SpeechLLM(make_config(encoder, OsumAdapterConfig(), llm, LoraSettings(rank=8)))


def features(batch: Batch, seconds: float | None = None) -> tuple[Tensor, Tensor]:
    """Compute the log-mel features of a batch, padded to ``seconds`` or to its longest, and the frames of each."""
    wave_BS = (
        batch.wave_BS
        if seconds is None
        else nn.functional.pad(batch.wave_BS, (0, round(seconds * 16000) - batch.wave_BS.shape[1]))
    )
    return log_mel(wave_BS, batch.samples), torch.tensor([frame_count(n) for n in batch.samples])


Loss = Callable[[Batch], Tensor]


def ours(vocabulary: int) -> tuple[nn.Module, Loss]:
    """Return this project's model and its mean loss of a batch."""
    model = make_model(vocabulary)
    freeze(model, STAGE)

    def loss(batch: Batch) -> Tensor:
        mel, _ = features(batch)
        frames = [frame_count(n) for n in batch.samples]
        output = model(mel, frames, model.layout(frames, batch.prompts, batch.answers, batch.about, batch.after))
        return output.loss_sum / output.label_count  # type: ignore[no-any-return]

    return model, loss


def padded(vocabulary: int) -> tuple[nn.Module, Loss]:
    """Return the padded reference and its mean loss."""
    model = PaddedReference(make_model(vocabulary))
    return model, lambda batch: model(*features(batch), batch.prompts, batch.answers)


def qwen2_audio(vocabulary: int) -> tuple[nn.Module, Loss]:
    """Return transformers' Qwen2-Audio of the same sizes and its mean loss."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    torch.manual_seed(0)
    mine = make_model(vocabulary).config
    heard, audio_token = mine.encoder, vocabulary - 1
    audio = {
        "num_mel_bins": 80,
        "d_model": heard["width"],
        "encoder_layers": heard["layers"],
        "encoder_attention_heads": heard["heads"],
        "encoder_ffn_dim": 4 * heard["width"],
        "max_source_positions": 1500,
    }
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=dict(mine.llm), audio_token_index=audio_token)
    )
    llm = model.model.language_model
    llm.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    add_lora(llm, LoraSettings(**mine.lora))

    def loss(batch: Batch) -> Tensor:
        mel_BTM, frames_B = features(batch, 30.0)
        heard_B = ((frames_B - 1) // 2 + 1 - 2) // 2 + 1
        rows = [[*p, *[audio_token] * int(n), *a] for p, n, a in zip(batch.prompts, heard_B, batch.answers)]
        longest = max(map(len, rows))
        ids_BL = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        inside_BL = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
        label_BL = torch.full_like(ids_BL, -100)
        for row, answer, labels in zip(rows, batch.answers, label_BL):
            labels[len(row) - len(answer) : len(row)] = torch.tensor(answer)
        frames = torch.arange(mel_BTM.shape[1]) < frames_B[:, None]
        output = model(
            input_ids=ids_BL,
            attention_mask=inside_BL.long(),
            input_features=mel_BTM.transpose(1, 2),
            feature_attention_mask=frames.long(),
            labels=label_BL,
            use_cache=False,
        )
        return output.loss  # type: ignore[no-any-return]

    return model, loss


SIDES: dict[str, Callable[[int], tuple[nn.Module, Loss]]] = {"ours": ours, "padded": padded, "qwen2_audio": qwen2_audio}


@dataclass
class Side:
    """One contestant, ready to step."""

    model: nn.Module
    loss: Loss
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.model.train()
        learns = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters, self.optimizer = learns, torch.optim.AdamW(learns, lr=1e-4, fused=True)
        if isinstance(self.model, SpeechLLM):
            self.optimizer = Optimizers(self.model, STAGE).all[0]

    def step(self, batch: Batch) -> float:
        """Learn from a batch; return its loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def gemm_rate() -> float:
    """Return the floating-point operations of a large float32 product by CPU second."""
    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    times = []
    for _ in range(PRODUCTS):
        began = time.process_time()
        a @ b
        times.append(time.process_time() - began)
    return 2 * GEMM**3 / statistics.median(times)


def needed(model: SpeechLLM, batch: Batch) -> float:
    """Return the floating-point operations that a step needs."""
    frames = [frame_count(n) for n in batch.samples]
    lengths = lay_out(batch.prompts, [model.speech_length(n) for n in frames], batch.answers).packed
    assert lengths is not None
    work = Work(frames, lengths[: len(frames)], batch.label_count)
    return sum(part.total for part in count_flops(model.config, STAGE.trainable, work).values())


def race(
    names: Sequence[str], vocabulary: int, dtype: torch.dtype, batches: list[Batch], rounds: int
) -> dict[str, Any]:
    """Let sides take turns; return the median seconds of sound by CPU second of each, and ours over the ceiling.

    A race whose ceiling moved too much counts for nothing; another one is run then. Each is told as it ends.
    """
    for _ in range(ATTEMPTS):
        figures = _race(names, vocabulary, dtype, batches, rounds)
        rates = ", ".join(f"{n} {rate:.2f}" for n, rate in figures["seconds_of_sound_by_cpu_second"].items())
        void = "; VOID, it wants a quieter machine" if figures["void"] else ""
        print(
            f"  {str(dtype)[6:]}, vocabulary of {vocabulary}: {rates}; {figures['share']:.1%} of a ceiling of "
            f"{figures['ceiling_gflops']:.0f} GFLOP/s, which moved by {figures['moved']:.1%}{void}",
            flush=True,
        )
        if not figures["void"]:
            break
    return figures


def _race(
    names: Sequence[str], vocabulary: int, dtype: torch.dtype, batches: list[Batch], rounds: int
) -> dict[str, Any]:
    sides = {name: Side(*SIDES[name](vocabulary), dtype) for name in names}
    if dtype is torch.float32 and "padded" in names:
        losses = {name: sides[name].loss(batches[0]).item() for name in ("ours", "padded")}
        if abs(losses["ours"] / losses["padded"] - 1) > 1e-4:
            raise SystemExit(f"the sides compute different losses: {losses}")
    mine = sides["ours"].model
    assert isinstance(mine, SpeechLLM)
    rates: dict[str, list[float]] = {name: [] for name in names}
    uses = []
    for name in names:
        sides[name].step(batches[0])
    ceilings = [gemm_rate()]
    for turn in tqdm(range(rounds), desc=f"{str(dtype)[6:]} {vocabulary}", leave=False):
        part = [batches[(turn * STEPS + i) % len(batches)] for i in range(STEPS)]
        sound = sum(batch.seconds for batch in part)
        for name in names:
            began = time.process_time()
            for batch in part:
                sides[name].step(batch)
            spent = time.process_time() - began
            rates[name].append(sound / spent)
            if name == "ours":
                uses.append(sum(needed(mine, batch) for batch in part) / spent)
        ceilings.append(gemm_rate())
    moved = max(ceilings) / min(ceilings) - 1
    return {
        "seconds_of_sound_by_cpu_second": {name: statistics.median(values) for name, values in rates.items()},
        # each turn over the mean of the ceilings before and behind it
        "share": statistics.median(use / statistics.mean(ceilings[i : i + 2]) for i, use in enumerate(uses)),
        "ceiling_gflops": statistics.median(ceilings) / 1e9,
        "moved": moved,
        "void": moved > STEADY,
    }


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def _peak(name: str, dtype: torch.dtype, batches: list[Batch], answer: Any) -> None:
    torch.set_num_threads(1)
    backend.load("cpu").activate()
    side = Side(*SIDES[name](VOCABULARY), dtype)
    gc.collect()
    loaded = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for batch in batches[:3]:
        side.step(batch)
    answer.put(_status("VmHWM") - loaded)


def peak(name: str, dtype: torch.dtype, batches: list[Batch]) -> int:
    """Return the bytes that a side takes above its loaded weights, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_peak, args=(name, dtype, batches, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"measuring the memory of {name} failed")
    return int(answer.get())


def main() -> None:
    """Measure, print, and write ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with train.jsonl of transcribed recordings")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        action="append",
        help="this one (default: both, where the processor has instructions for bfloat16)",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu = backend.load("cpu")
    cpu.activate()
    dtypes = args.dtype or ["float32"]
    if not args.dtype and cpu.training_dtype is torch.bfloat16:
        dtypes.append("bfloat16")
    elif not args.dtype:
        print(f"bfloat16 is left out: a training here is in {cpu.diagnose()['training']}")
    batches, similar = (read_batches(args.folder, 10, similar=similar) for similar in (False, True))
    sound = statistics.mean(batch.seconds for batch in batches)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {sound:.0f} s of sound a step")
    print(f"seconds of sound by CPU second, medians of {args.rounds} rounds")
    figures: dict[str, Any] = {}
    for dtype in [getattr(torch, name) for name in dtypes]:
        memory = {name: peak(name, dtype, batches) for name in ("ours", "padded")}  # first, while this process is small
        # races of few sides are short, and in a short one the ceiling moves less
        alone = race(["ours"], VOCABULARY, dtype, batches, args.rounds)
        races = {
            "vs_padded": race(["ours", "padded"], VOCABULARY, dtype, batches, args.rounds),
            "vs_padded_small_vocabulary": race(["ours", "padded"], SMALL_VOCABULARY, dtype, batches, args.rounds),
        }
        if dtype is torch.float32:
            races["vs_qwen2_audio"] = race(["ours", "qwen2_audio"], VOCABULARY, dtype, batches, args.rounds)
        races["vs_padded_similar_lengths"] = race(["ours", "padded"], VOCABULARY, dtype, similar, args.rounds)
        row = {
            **{name: truediv(*each["seconds_of_sound_by_cpu_second"].values()) for name, each in races.items()},
            "memory_vs_padded": memory["ours"] / memory["padded"],
            "gemm_share": alone["share"],
        }
        figures[str(dtype)[6:]] = row
        print(
            f"{str(dtype)[6:]}: memory above the weights: "
            + ", ".join(f"{n} {b / 2**20:.0f} MiB" for n, b in memory.items())
        )
        print("  " + ", ".join(f"{n} {v:.3f}" for n, v in row.items()))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

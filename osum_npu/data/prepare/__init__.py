"""Manifests from public corpora in their own layouts; no sound is copied.

``PREPARE[name](source, out)`` writes ``out/<part>.jsonl`` for each part of the corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from osum_npu.data.prepare.aishell1 import prepare_aishell1
from osum_npu.data.prepare.fsdd import prepare_fsdd
from osum_npu.data.prepare.librispeech import prepare_librispeech
from osum_npu.data.prepare.parts import Skipped, Summary
from osum_npu.data.prepare.speechocean762 import prepare_speechocean762

PREPARE: dict[str, Callable[[Path, Path], Summary]] = {
    "aishell1": prepare_aishell1,
    "fsdd": prepare_fsdd,
    "librispeech": prepare_librispeech,
    "speechocean762": prepare_speechocean762,
}

__all__ = ["PREPARE", "Skipped", "Summary"]

"""The tasks of OSUM and OSUM-Pangu: tags and label sets. Labels combine in any order.

Tags, label spelling and case are those that released checkpoints were trained on (ASLP-lab/OSUM, OSUM/README.md and its
prompt configuration; ASLP-lab/OSUM-Pangu, its prompt configuration and data pipeline).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

Kind = Literal["text", "chat", "chat_think", "text2text", "intent"]
"""What a question gives and wants, in OSUM-Pangu's words (its ``output_type``): speech to text, speech to a reply, to a
reply with the thought before it, text to text, and text to the tags of the task that it asks for."""

PREFIXES = {
    "TRANSCRIBE": "asr",
    "ALIGN": "align",
    "S2TCHAT": "chat",
    "EMOTION": "emotion",
    "STYLE": "style",
    "CAPTION": "caption",
    "AGE": "age",
    "GENDER": "gender",
}
"""What OSUM-Pangu's answers begin with for each tag of the task; other tags have nothing there."""

_TAG = re.compile(r"<(\w+)>")


@dataclass(frozen=True)
class Task:
    """One thing to ask about a recording."""

    name: str
    """What users write: ``--tasks asr,gender``."""
    code: str
    """OSUM's own abbreviation; accepted wherever a name is."""
    tag: str
    """OSUM's tag string, with a space between two tags."""
    labels: tuple[str, ...] = ()
    """Classes of a task whose answer is one of a set; empty for the others."""
    parts: tuple[Task, ...] = ()
    """The tasks whose labels a combination asks for at once, in the order of the answer."""
    transcript: bool = True
    """Whether the transcript is asked for too."""
    kind: Kind = "text"

    @property
    def hears(self) -> bool:
        """Whether the question is about a sound, and not about a text alone."""
        return self.kind not in ("text2text", "intent")

    @property
    def choices(self) -> tuple[Task, ...]:
        """The tasks whose labels the answer holds, in its order: the parts, or the task itself; none without labels."""
        return self.parts or ((self,) if self.labels else ())

    @property
    def prefix(self) -> str:
        """What an answer of OSUM-Pangu begins with: ``<asr><age>``; empty for tasks without such tags."""
        return "".join(f"<{PREFIXES[tag]}>" for tag in _TAG.findall(self.tag) if tag in PREFIXES)


ASR = Task("asr", "ASR", "<TRANSCRIBE>")
TIMESTAMPS = Task("timestamps", "SRWT", "<TRANSCRIBE> <ALIGN>")
EVENT = Task(
    "event",
    "VED",
    "<TRANSCRIBE> <CAPTION>",
    ("laugh", "cough", "cry", "screaming", "sigh", "throat clearing", "sneeze", "other"),
)
EMOTION = Task(
    "emotion",
    "SER",
    "<TRANSCRIBE> <EMOTION>",
    ("sad", "anger", "neutral", "happy", "surprise", "fear", "disgust", "other"),
)
STYLE = Task(
    "style",
    "SSR",
    "<TRANSCRIBE> <STYLE>",
    ("新闻科普", "恐怖故事", "童话故事", "客服", "诗歌散文", "有声书", "日常口语", "其他"),
)
GENDER = Task("gender", "SGC", "<TRANSCRIBE> <GENDER>", ("female", "male"))
AGE = Task("age", "SAP", "<TRANSCRIBE> <AGE>", ("child", "adult", "old"))
CHAT = Task("chat", "STTC", "<TRANSCRIBE> <S2TCHAT>", kind="chat")

TASKS: dict[str, Task] = {t.name: t for t in (ASR, TIMESTAMPS, EVENT, EMOTION, STYLE, GENDER, AGE, CHAT)}

LABELLED = (EVENT, EMOTION, STYLE, GENDER, AGE)
"""The tasks whose labels combine."""

SYNONYMS = {
    "age": {"youth": "adult", "middle_age": "adult", "middle": "adult"},
    "emotion": {"angry": "anger"},
}
"""Other names of labels in OSUM-Pangu's data and answers, by task."""


@cache
def combine(parts: tuple[Task, ...], transcript: bool, /) -> Task:  # by position alone: its key in the cache
    """Return the task that asks for the labels of all ``parts``, in their order; the same object every time.

    Args:
        parts: different tasks with labels, such as ``(AGE, GENDER)``.
        transcript: whether the transcript is asked for too.
    """
    if transcript and len(parts) == 1:
        return parts[0]
    tags = [part.tag.removeprefix(f"{ASR.tag} ") for part in parts]
    return Task(
        name="+".join(part.name for part in parts) + ("" if transcript else "-only"),
        code="+".join(part.code for part in parts) + ("" if transcript else "-ONLY"),
        tag=" ".join([ASR.tag, *tags] if transcript else tags),
        parts=parts,
        transcript=transcript,
    )


COMBINATIONS: dict[str, Task] = {
    t.name: t
    for t in (
        *(combine((t,), False) for t in LABELLED),
        combine((AGE, GENDER), True),
        combine((AGE, GENDER), False),
        combine((STYLE, AGE, GENDER), True),
        combine((STYLE, AGE, GENDER), False),
    )
}
"""One label alone, and the sets of labels that OSUM releases; :func:`get_task` knows all others. The tags are those of
OSUM and OSUM-Pangu; they have no abbreviations for them, these are made of the parts'."""

DIALOGUES: dict[str, Task] = {
    t.name: t
    for t in (
        Task("chat-only", "STTC-ONLY", "<S2TCHAT>", transcript=False, kind="chat"),
        Task("chat_think", "STTC-THINK", "<S2TCHAT> <THINKER>", transcript=False, kind="chat_think"),
        Task("text2text", "T2T", "<TEXT2TEXT>", transcript=False, kind="text2text"),
        Task("intent", "INTENT", "<INTENT_CLASSIFICATION>", transcript=False, kind="intent"),
    )
}
"""What OSUM-Pangu adds: replies alone, with a thought before them, or to written questions, and the task that a written
instruction asks for. The codes are ours."""

LISTED: dict[str, Task] = {**TASKS, **COMBINATIONS, **DIALOGUES}
"""All tasks but the further combinations."""

CHAT_SEPARATOR = "<开始回答>"
"""Stands between transcript and answer in the chat task."""

_SPELLED = {word.replace(" ", ""): t for t in LISTED.values() for word in (t.code, t.tag)}
_LABELLED = {word: t for t in LABELLED for word in (t.name.upper(), t.code, _TAG.findall(t.tag)[-1])}


def get_task(name: str) -> Task:
    """Return the task that users call ``name`` (``gender``), by code (``SGC``) or by tag (``<TRANSCRIBE><GENDER>``).

    Labels combine in any order: ``emotion+age``, without transcript ``emotion+age-only``; codes and tags do, too.
    The same name gives the same object.

    Raises:
        ValueError: no task is called that.
    """
    plain = name.upper().replace(" ", "")
    task = LISTED.get(name) or _SPELLED.get(plain) or _combination(plain)
    if task is None:
        raise ValueError(
            f"there is no task {name!r}; the tasks are {', '.join(LISTED)}; "
            "labels combine in any order: emotion+age, style+gender-only"
        )
    return task


def _combination(plain: str) -> Task | None:
    """Read ``SAP+GENDER-ONLY`` or ``<AGE><GENDER>``; ``None`` where that is no combination of labels."""
    if plain.startswith("<"):
        tags = _TAG.findall(plain)
        if "".join(f"<{tag}>" for tag in tags) != plain:
            return None
        transcript = tags[0] == "TRANSCRIBE"
        words = tags[1:] if transcript else tags
    else:
        transcript = not plain.endswith("-ONLY")
        words = plain.removesuffix("-ONLY").split("+")
    parts = tuple(_LABELLED[word] for word in words if word in _LABELLED)
    if not parts or len(set(parts)) < len(words):
        return None
    return combine(parts, transcript)

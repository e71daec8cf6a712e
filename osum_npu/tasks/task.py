"""The eight tasks of OSUM and their combinations: tags and label sets.

Tags, label spelling and case are those that released OSUM checkpoints were trained on
(ASLP-lab/OSUM, OSUM/README.md and its prompt configuration).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "chat", "chat_think", "text2text", "intent"]
"""What a question gives and wants, in OSUM-Pangu's words (its ``output_type``): speech to text, speech to a reply, to a
reply with the thought before it, text to text, and text to the tags of the task that it asks for."""


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

COMBINATIONS: dict[str, Task] = {
    t.name: t
    for t in (
        *(
            Task(f"{t.name}-only", f"{t.code}-ONLY", t.tag.removeprefix("<TRANSCRIBE> "), parts=(t,), transcript=False)
            for t in (EVENT, EMOTION, STYLE, GENDER, AGE)
        ),
        Task("age+gender", "SAP+SGC", "<TRANSCRIBE> <AGE> <GENDER>", parts=(AGE, GENDER)),
        Task("age+gender-only", "SAP+SGC-ONLY", "<AGE> <GENDER>", parts=(AGE, GENDER), transcript=False),
        Task("style+age+gender", "SSR+SAP+SGC", "<TRANSCRIBE> <STYLE> <AGE> <GENDER>", parts=(STYLE, AGE, GENDER)),
        Task(
            "style+age+gender-only",
            "SSR+SAP+SGC-ONLY",
            "<STYLE> <AGE> <GENDER>",
            parts=(STYLE, AGE, GENDER),
            transcript=False,
        ),
    )
}
"""One label alone, or several in one answer. The tags are those of OSUM and, for one label alone, of OSUM-Pangu; they have
no abbreviations for them, these are made of the parts'."""

CHAT_SEPARATOR = "<开始回答>"
"""Stands between transcript and answer in the chat task."""


def get_task(name: str) -> Task:
    """Return the task that users call ``name`` (``gender``), by code (``SGC``) or by tag (``<TRANSCRIBE><GENDER>``).

    Raises:
        ValueError: no task is called that.
    """
    known = {**TASKS, **COMBINATIONS}
    if name in known:
        return known[name]
    plain = name.upper().replace(" ", "")
    for task in known.values():
        if plain in (task.code, task.tag.replace(" ", "")):
            return task
    raise ValueError(f"there is no task {name!r}; the tasks are {', '.join(known)}")

"""What can be asked about speech, how it is asked, and how an answer is written and read."""

from osum_npu.tasks.answer import Answer, missing, read, read_prefixed, spell, write
from osum_npu.tasks.prompts import (
    Prompts,
    draw_prompt,
    first_prompt,
    prompt_fault,
    prompts,
    read_prompts,
    wordings_of,
)
from osum_npu.tasks.task import (
    CHAT_SEPARATOR,
    COMBINATIONS,
    DIALOGUES,
    LISTED,
    SYNONYMS,
    TASKS,
    Task,
    combine,
    get_task,
)
from osum_npu.tasks.text import HAN, join_words, normalize_text, split_words
from osum_npu.tasks.utterance import Utterance, Word

__all__ = [
    "CHAT_SEPARATOR",
    "COMBINATIONS",
    "DIALOGUES",
    "HAN",
    "LISTED",
    "SYNONYMS",
    "TASKS",
    "Answer",
    "Prompts",
    "Task",
    "Utterance",
    "Word",
    "combine",
    "draw_prompt",
    "first_prompt",
    "get_task",
    "join_words",
    "missing",
    "normalize_text",
    "prompt_fault",
    "prompts",
    "read",
    "read_prefixed",
    "read_prompts",
    "spell",
    "split_words",
    "wordings_of",
    "write",
]

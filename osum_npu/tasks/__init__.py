"""What can be asked about speech, how it is asked, and how an answer is written and read."""

from osum_npu.tasks.answer import Answer, missing, read, spell, write
from osum_npu.tasks.prompts import Prompts, draw_prompt, first_prompt, prompts, read_prompts
from osum_npu.tasks.task import CHAT_SEPARATOR, COMBINATIONS, TASKS, Task, get_task
from osum_npu.tasks.text import HAN, join_words, normalize_text, split_words
from osum_npu.tasks.utterance import Utterance, Word

__all__ = [
    "CHAT_SEPARATOR",
    "COMBINATIONS",
    "HAN",
    "TASKS",
    "Answer",
    "Prompts",
    "Task",
    "Utterance",
    "Word",
    "draw_prompt",
    "first_prompt",
    "get_task",
    "join_words",
    "missing",
    "normalize_text",
    "prompts",
    "read",
    "read_prompts",
    "spell",
    "split_words",
    "write",
]

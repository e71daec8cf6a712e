"""What can be asked about speech, how it is asked, and how an answer is written and read."""

from osum_npu.tasks.answer import Answer, missing, read, spell, write
from osum_npu.tasks.prompts import default_prompt, draw_prompt, prompts
from osum_npu.tasks.task import CHAT_SEPARATOR, TASKS, Task, get_task
from osum_npu.tasks.text import HAN, join_words, normalize_text, split_words
from osum_npu.tasks.utterance import Utterance, Word

__all__ = [
    "CHAT_SEPARATOR",
    "HAN",
    "TASKS",
    "Answer",
    "Task",
    "Utterance",
    "Word",
    "default_prompt",
    "draw_prompt",
    "get_task",
    "join_words",
    "missing",
    "normalize_text",
    "prompts",
    "read",
    "spell",
    "split_words",
    "write",
]

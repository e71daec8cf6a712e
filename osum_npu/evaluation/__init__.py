"""Scores by task, and the report that shows them. Needs the extra ``eval``."""

from osum_npu.evaluation.metrics import Metric, headline, score
from osum_npu.evaluation.report import Example, format_instructions, format_table, write_report
from osum_npu.evaluation.text import release_tokens, tokens

__all__ = [
    "Example",
    "Metric",
    "format_instructions",
    "format_table",
    "headline",
    "release_tokens",
    "score",
    "tokens",
    "write_report",
]

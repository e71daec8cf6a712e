"""A device held to the reference on the host, from single ops to a training: what ``osum-npu parity`` runs."""

from osum_npu.comparison.levels import LEVELS, compare_levels
from osum_npu.comparison.report import write_report
from osum_npu.comparison.tape import Tape

__all__ = ["LEVELS", "Tape", "compare_levels", "write_report"]

"""osum-npu: speech-understanding language models on Ascend NPUs and, by one variable, elsewhere.

Nothing heavy is imported here: torch, transformers and whisper cost seconds, and are
imported by the modules that need them.
"""

__version__ = "0.1.0"

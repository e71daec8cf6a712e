"""The model card of a finished training."""

from __future__ import annotations

from osum_npu import __version__
from osum_npu.config import Recipe, WhisperModel, dump_recipe


def model_card(recipe: Recipe) -> str:
    """Write ``README.md`` of a model directory: what it is, how to use it, how it was made."""
    wording = f" --prompts {recipe.prompts}" if recipe.prompts is not None else ""
    tasks = sorted({task for stage in recipe.stages for task in stage.tasks})
    title = "A speech-understanding model"
    use = f"```sh\nosum-npu infer --model THIS_FOLDER --tasks {','.join(tasks)}{wording} recording.wav\n```"
    if isinstance(recipe.model, WhisperModel):
        title = "A Whisper that answers tasks"
        use = (
            "The encoder is meant for an LLM: `model.encoder_weights: THIS_FOLDER` in the recipe of the next stage.\n"
            "transformers loads the whole as `WhisperForConditionalGeneration`."
        )
    return f"""---
library_name: osum-npu
pipeline_tag: automatic-speech-recognition
tags: [speech, speech-llm]
---

# {title}

Trained by osum-npu {__version__} for: {", ".join(tasks)}.

{use}

## Recipe

```yaml
{dump_recipe(recipe).strip()}
```
"""

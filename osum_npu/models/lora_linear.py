"""A linear layer with a low-rank update."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor


class LoraLinear(lora.Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's layer for its vanilla update, without wide tensors in between.

    PEFT computes ``base(x) + up(down(dropout(x))) · scale``: the product, the scaled one and the sum are as wide as the
    result, and the backward pass scales the gradient of the result once more. Here the scale meets the narrow side, and
    the sum is part of the matrix product (``addmm``).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``[..., out]`` of ``x`` ``[..., in]``, in the dtype of the layer below; sums are in LoRA's dtype."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        wide = result.flatten(0, -2)
        for name in self.active_adapters:
            down, up = self.lora_A[name], self.lora_B[name]
            narrow = down(self.lora_dropout[name](x.to(down.weight.dtype))).flatten(0, -2)
            # not a view of the weight, for which the backward pass would choose a product that is an order slower
            up_RO = up.weight.t().contiguous()
            wide = torch.addmm(wide.to(narrow.dtype), narrow, up_RO, alpha=self.scaling[name])
        return wide.view(result.shape).to(result.dtype)

"""Ascend NPUs: the fused operators of torch_npu, and MindSpeed's where they are asked for.

What each operator takes is documented in torch_npu's operator pages; its C++ leaves much of it unchecked, so the rules
stand here, in ``accepts`` and in how the calls are made.
"""

from . import activation, attention, mindspeed, norm, rotary

__all__ = ["activation", "attention", "mindspeed", "norm", "rotary"]

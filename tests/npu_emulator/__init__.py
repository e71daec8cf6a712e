"""NPU code without an NPU: what the fused operators mean, a stand-in for torch_npu, the real wheel on emulated CANN.

Nothing here imports the project that is tested with it. README.md says what is real and what is emulated.
"""

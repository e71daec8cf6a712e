"""Faster ways to compute the ops of ``osum_npu.functional``, one module a backend."""

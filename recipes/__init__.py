"""Recipes by family, installed so that `osum-npu quickstart` finds its own."""

"""The command `osum-npu`: one file a verb."""

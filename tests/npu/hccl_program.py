"""Started by test_emulated_hccl.py, two processes: each prints one line a check that held."""

import copy
import datetime

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401  brings the device
from torch.distributed.fsdp import fully_shard


def raises(call):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    raise AssertionError("did not raise")


def apart(model, alone, read=lambda gradient: gradient):
    """Largest difference of gradients from those of one process."""
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return max(float((read(mine.grad).cpu() - theirs.grad).abs().max()) for mine, theirs in pairs)


def main():
    dist.init_process_group("hccl", timeout=datetime.timedelta(seconds=100))
    rank = dist.get_rank()
    torch.npu.set_device(rank)
    report = lambda what: print(f"{what}: {rank} ok\n", end="", flush=True)  # noqa: E731  in one piece

    total = torch.tensor([rank + 1.0, 2.0], device="npu")
    dist.all_reduce(total)
    assert total.tolist() == [3.0, 4.0]
    shared = torch.full((2,), rank, device="npu")
    dist.broadcast(shared, 1)
    assert shared.tolist() == [1, 1]
    parts = [torch.empty(1, device="npu") for _ in range(2)]
    dist.all_gather(parts, torch.tensor([float(rank)], device="npu"))
    assert [part.item() for part in parts] == [0.0, 1.0]
    piece = torch.empty(1, device="npu")
    dist.reduce_scatter_tensor(piece, torch.tensor([1.0, 2.0], device="npu"))
    assert piece.item() == 2.0 * (rank + 1)
    dist.barrier()
    report("collectives")

    mean = torch.tensor([float(rank)], device="npu")
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    assert mean.item() == 0.5
    report("average")
    half = torch.ones(3, dtype=torch.bfloat16, device="npu")
    dist.all_reduce(half)
    assert half.eq(2).all()
    report("bfloat16")
    for dtype in (torch.float64, torch.bool, torch.uint8):
        unwanted = torch.zeros(1, dtype=dtype, device="npu")
        assert "Unsupported data type" in raises(lambda unwanted=unwanted: dist.all_reduce(unwanted))
    report("refused dtypes")
    flags = torch.zeros(1, dtype=torch.int32, device="npu")
    assert "bitwise" in raises(lambda: dist.all_reduce(flags, dist.ReduceOp.BAND))
    report("bitwise")
    gathered = [torch.empty(1, device="npu") for _ in range(2)] if rank == 0 else None
    dist.gather(torch.tensor([float(rank)], device="npu"), gathered)
    assert gathered is None or [x.item() for x in gathered] == [0.0, 1.0]
    report("gather")
    for step in range(50):  # the shorter one grows on the device before it is sent
        words = [f"rank {who} " * (1 + 200 * ((who + step) % 2)) for who in range(2)]
        everyone = [""] * 2
        dist.all_gather_object(everyone, words[rank])
        assert everyone == words
    report("objects")
    assert "cpu" in raises(lambda: dist.all_reduce(torch.zeros(1)))
    report("host tensors")

    torch.manual_seed(0)
    alone = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    batch = torch.randn(4, 8)
    model = copy.deepcopy(alone).npu()
    alone(batch).square().mean().backward()
    own = batch[2 * rank : 2 * rank + 2].npu()
    ddp = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model), device_ids=[rank])
    ddp(own).square().mean().backward()
    assert apart(ddp.module, alone) < 1e-6
    report("ddp")
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    model(own).square().mean().backward()
    assert apart(model, alone, lambda gradient: gradient.full_tensor()) < 1e-6
    report("fsdp2")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Optimizers, autocast, checkpoints and random numbers of the torch_npu wheel on the emulated device."""

import os

import plain_formulas as formulas
import pytest
import torch
import torch.nn.functional as F
from npu_emulator.explain import error

pytestmark = pytest.mark.emulated_npu


def small_model():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.GELU(), torch.nn.Linear(16, 4))


def losses(device, make_optimizer, steps=4, dtype=None):
    torch.manual_seed(1)
    model = small_model().to(device)
    optimizer = make_optimizer(model.parameters(), lr=1e-2, weight_decay=0.1)
    found = []
    for _ in range(steps):
        x = torch.randn(5, 8).to(device)
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss = (model(x) - 1).square().mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("foreach", [False, True])
def test_adamw_steps_as_on_the_cpu(wheel, foreach):
    make = lambda parameters, **options: torch.optim.AdamW(parameters, foreach=foreach, **options)  # noqa: E731
    assert torch.allclose(losses("npu", make), losses("cpu", make), rtol=1e-5)


def test_npu_fused_adamw_steps_as_adamw(wheel):
    got = losses("npu", wheel.optim.NpuFusedAdamW)
    assert torch.allclose(got, losses("cpu", torch.optim.AdamW), rtol=1e-5)


def test_npu_fused_adamw_limits(wheel):
    half = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16, device="npu"))
    half.grad = torch.ones_like(half)
    with pytest.raises(TypeError):
        wheel.optim.NpuFusedAdamW([half]).step()
    weight = torch.nn.Parameter(torch.zeros(4, device="npu"))
    optimizer = wheel.optim.NpuFusedAdamW([weight])
    weight.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="set_to_none"):
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("dtype", formulas.DTYPES[1:])
def test_autocast(wheel, dtype):
    x, weight = torch.randn(4, 8).npu(), torch.randn(3, 8).npu()
    with torch.autocast("npu", dtype=dtype):
        assert F.linear(x, weight).dtype == dtype
        assert F.linear(x, weight).softmax(-1).dtype == torch.float32
        assert F.layer_norm(F.linear(x, weight), (3,)).dtype == torch.float32
        assert F.scaled_dot_product_attention(*[torch.randn(1, 2, 4, 16).npu()] * 3).dtype == dtype
    got, want = (losses(device, torch.optim.AdamW, dtype=torch.bfloat16) for device in ("npu", "cpu"))
    assert torch.allclose(got, want, rtol=2e-2)


def test_fused_operators_under_autocast_say_what_is_mixed(wheel):
    """The operators are in no autocast list, so a float32 gamma meets a bfloat16 activation and is refused."""
    x, weight, gamma = torch.randn(4, 8).npu(), torch.randn(3, 8).npu(), torch.ones(3).npu()
    with torch.autocast("npu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="gamma-has-input-dtype"):
        wheel.npu_rms_norm(F.linear(x, weight), gamma)


def test_grad_scaler_skips_an_overflow_and_halves(wheel):
    weight = torch.nn.Parameter(torch.ones(3, device="npu"))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("npu", init_scale=4.0, growth_interval=1)
    scaler.scale((weight * torch.tensor([1.0, 2.0, torch.inf], device="npu")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.detach().eq(1).all()
    assert scaler.get_scale() == 2.0
    optimizer.zero_grad()
    scaler.scale((weight * 0.5).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.detach().eq(0.5).all()
    assert scaler.get_scale() == 4.0


def test_clipped_gradients(wheel):
    mine, theirs = formulas.leaves(torch.randn(5), torch.randn(3), device="npu")
    for parameters in (mine, theirs):
        sum(x.pow(3).sum() for x in parameters).backward()
    norms = [torch.nn.utils.clip_grad_norm_(parameters, 0.5) for parameters in (mine, theirs)]
    assert error(*norms) <= 1e-5
    assert error(mine[0].grad, theirs[0].grad) <= 1e-5


def test_activation_checkpointing_repeats_dropout(wheel):
    x = torch.randn(16, 16).npu().requires_grad_()
    drop = lambda y: F.dropout(y, 0.5)  # noqa: E731
    out = torch.utils.checkpoint.checkpoint(drop, x, use_reentrant=False)
    out.sum().backward()
    assert torch.equal(x.grad.cpu() != 0, out.detach().cpu() != 0)


@pytest.mark.parametrize(("source", "target"), [("npu", "cpu"), ("cpu", "npu"), ("npu", "npu")])
def test_checkpoints_move_between_devices(wheel, tmp_path, source, target):
    model = small_model().to(source)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8, device=source)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", map_location=target, weights_only=True)
    other = small_model().to(target)
    other.load_state_dict(state["model"])
    resumed = torch.optim.AdamW(other.parameters())
    resumed.load_state_dict(state["optimizer"])
    for twin, parameter in ((m, p) for pair in zip([model], [other]) for m, p in zip(*(x.parameters() for x in pair))):
        assert parameter.device.type == target
        assert torch.equal(parameter.cpu(), twin.cpu())
    x = torch.ones(2, 8)
    assert torch.allclose(other(x.to(target)).cpu(), model(x.to(source)).cpu())


def test_safetensors(wheel, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weight = torch.randn(4, 3)
    safetensors.save_file({"weight": weight.npu()}, tmp_path / "x.safetensors")
    assert torch.equal(safetensors.load_file(tmp_path / "x.safetensors")["weight"], weight)


@pytest.mark.emulator_only
def test_random_numbers_follow_the_seed(wheel):
    torch.manual_seed(7)
    got = torch.randn(5, device="npu")
    torch.manual_seed(7)
    assert torch.equal(got.cpu(), torch.randn(5)), "one seed makes a run equal to the CPU's"
    torch.npu.manual_seed(7)
    assert torch.equal(torch.randn(5, device="npu"), got)
    state = torch.npu.get_rng_state()
    one = torch.rand(4, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="npu"), one)


def test_a_generator_of_the_device_keeps_its_own_state(wheel):
    generator = torch.Generator("npu").manual_seed(3)
    first = torch.randn(4, device="npu", generator=generator)
    state = generator.get_state()
    second = torch.randn(4, device="npu", generator=generator)
    assert not torch.equal(first, second)
    generator.set_state(state)
    torch.manual_seed(9)
    assert torch.equal(torch.randn(4, device="npu", generator=generator), second)


@pytest.mark.emulator_only
def test_the_device_answers(wheel):
    assert torch.accelerator.current_accelerator().type == "npu"
    assert torch.npu.device_count() == int(os.environ["NPU_EMULATOR_DEVICES"])
    before = torch.npu.memory_allocated()
    block = torch.empty(1 << 20, dtype=torch.uint8, device="npu")
    assert torch.npu.memory_allocated() - before >= block.numel()
    assert torch.npu.max_memory_allocated() >= torch.npu.memory_allocated()
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.npu.stream(torch.npu.Stream()):
        block.zero_()
    end.record()
    torch.npu.synchronize()
    assert start.elapsed_time(end) >= 0

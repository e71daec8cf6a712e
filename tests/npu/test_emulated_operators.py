"""The torch_npu wheel on the emulated device against plain torch on the CPU.

Real: Python, schemas, autograd formulas, autocast lists, routing of attention, optimizer, allocator, host checks.
Emulated: what a kernel computes. So these tests hold a caller's use of torch_npu to account, not the hardware.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from npu_emulator.explain import TOLERANCE, error
from plain_formulas import (
    DTYPES,
    ENDS,
    KEY_ENDS,
    OWN,
    SCALE,
    SEEN,
    TRIANGLE,
    VERSIONS,
    B,
    D,
    K,
    L,
    N,
    S,
    agree,
    complex_rotation,
    infer,
    leaves,
    packed_plain,
    plain,
    spelled,
    write,
)

pytestmark = pytest.mark.emulated_npu


@pytest.fixture(autouse=True)
def calls(wheel):
    """Calls of each fused operator within this test."""
    from npu_emulator import kernels

    torch.manual_seed(0)
    kernels.calls.clear()
    return kernels.calls


def on_npu(options):
    return {name: x.npu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def heads(dtype=torch.float32, width=D):
    shapes = [(B, N, S, D), (B, K, L, D), (B, K, L, width)]
    return leaves(*(torch.randn(shape) for shape in shapes), dtype=dtype, device="npu")


# Attention


@pytest.mark.parametrize("seen", ["all", "padded", "own, mode 1, uint8", "top left", "bottom right", "band"])
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
@pytest.mark.parametrize("version", VERSIONS)
def test_training_attention(wheel, calls, version, layout, seen):
    mine, theirs = heads()
    options, allowed = SEEN[seen]
    inputs = [write(x, layout) for x in mine]
    got = getattr(wheel, version)(*inputs, N, layout, scale=SCALE, **spelled(version, **on_npu(options)))[0]
    assert got.device.type == "npu"
    agree(got, write(plain(*theirs, allowed), layout), mine, theirs)
    assert calls == {version: 1, version.replace("attention", "attention_grad"): 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seen", ["all", "bottom right"])
@pytest.mark.parametrize("version", VERSIONS)
def test_training_attention_in_a_dtype(wheel, version, seen, dtype):
    mine, theirs = heads(dtype)
    options, allowed = SEEN[seen]
    got = getattr(wheel, version)(*mine, N, "BNSD", scale=SCALE, **on_npu(options))[0]
    assert got.dtype == dtype
    agree(got, plain(*theirs, allowed), mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("mode", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("version", VERSIONS)
def test_packed_training_attention(wheel, version, mode):
    shapes = [(9, N, D), (14, K, D), (14, K, D)]
    mine, theirs = leaves(*(torch.randn(shape) for shape in shapes), device="npu")
    ends, key_ends = ENDS, KEY_ENDS
    if version == "npu_fusion_attention_v3":
        ends, key_ends = torch.tensor(ENDS), torch.tensor(KEY_ENDS)
    options = {"actual_seq_qlen": ends, "actual_seq_kvlen": key_ends}
    if mode is not None:
        options |= {"sparse_mode": mode, "atten_mask": (~OWN[:5, :5] if mode == 1 else TRIANGLE).npu()}
    if mode == 4:
        options |= {"pre_tokens": 2, "next_tokens": 0}
    got = getattr(wheel, version)(*mine, N, "TND", scale=SCALE, **spelled(version, **options))[0]
    agree(got, packed_plain(*theirs, mode), mine, theirs)


@pytest.mark.parametrize("version", VERSIONS)
def test_dropout_of_forward_and_backward_is_the_same(wheel, version):
    """With v = identity the output shows which probabilities were kept; the gradient must come through those alone."""
    q = torch.randn(1, 2, 8, 8).npu()
    v = torch.eye(8).expand(1, 2, 8, 8).contiguous().npu().requires_grad_()
    kept = getattr(wheel, version)(q, q, v, 2, "BNSD", scale=SCALE, keep_prob=0.5)[0]
    assert 0.2 < kept.detach().eq(0).float().mean() < 0.8
    kept.sum().backward()
    assert error(v.grad, kept.detach().cpu().sum(-2, keepdim=True).transpose(2, 3).expand(1, 2, 8, 8)) <= 1e-5


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH"])
@pytest.mark.parametrize("seen", ["all", "padded", "bottom right", "band"])
@torch.no_grad()
def test_inference_attention(wheel, version, layout, seen):
    mine, theirs = heads(torch.bfloat16)
    options, allowed = SEEN[seen]
    got, _ = infer(wheel, version, *(write(x, layout) for x in mine), layout, **on_npu(options))
    assert error(got, write(plain(*theirs, allowed), layout)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@torch.no_grad()
def test_a_step_of_decoding(wheel, dtype):
    shapes = [(B, N, 1, D), (B, K, L, D), (B, K, L, D)]
    mine, theirs = leaves(*(torch.randn(shape) for shape in shapes), dtype=dtype, device="npu")
    got, lse = infer(wheel, 1, *mine, lengths=(None, [L, 5]), lse=True)
    assert error(got, plain(*theirs, SEEN["padded"][1][:, :, :1])) <= TOLERANCE[dtype]
    assert lse.shape == (B, N, 1, 1)


# Norm, rotary, activation, loss


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(wheel, dtype):
    mine, theirs = leaves(torch.randn(2, 5, 48) * 3, 1 + 0.3 * torch.randn(48), dtype=dtype, device="npu")
    y, rstd = wheel.npu_rms_norm(*mine, epsilon=1e-5)
    assert rstd.dtype == torch.float32
    agree(y, F.rms_norm(theirs[0], (48,), theirs[1], 1e-5), mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(wheel, dtype):
    mine, theirs = leaves(*(torch.randn(shape) for shape in ((3, 16), (3, 16), (16,))), dtype=dtype, device="npu")
    with torch.no_grad():
        y, _, total = wheel.npu_add_rms_norm(*mine)
    assert error(total, theirs[0] + theirs[1]) <= TOLERANCE[dtype]
    assert error(y, F.rms_norm(theirs[0] + theirs[1], (16,), theirs[2], 1e-6)) <= TOLERANCE[dtype]
    with pytest.raises(RuntimeError, match="inference-only"):
        wheel.npu_add_rms_norm(*mine)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("tables", [(1, 1, 5, 8), (1, 5, 1, 8)])
def test_rotary(wheel, mode, tables, dtype):
    angle = torch.rand(*tables[:3], 4) * 6
    wide = angle.repeat_interleave(2, -1) if mode == "interleave" else angle.repeat(1, 1, 1, 2)
    shape = [2, 3, 3, 8]
    shape[tables.index(5)] = 5
    mine, theirs = leaves(torch.randn(shape), dtype=dtype, device="npu")
    tables = (x.npu().to(dtype) for x in (wide.cos(), wide.sin()))
    want = complex_rotation(theirs[0], angle, mode == "interleave")
    agree(wheel.npu_rotary_mul(*mine, *tables, mode), want, mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [-1, 0])
def test_swiglu(wheel, dim, dtype):
    mine, theirs = leaves(torch.randn(6, 10), dtype=dtype, device="npu")
    gate, up = theirs[0].tensor_split(2, dim)
    agree(wheel.npu_swiglu(*mine, dim=dim), F.silu(gate) * up, mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(wheel, approximate, dtype):
    mine, theirs = leaves(torch.randn(5, 7) * 2, dtype=dtype, device="npu")
    got, want = wheel.npu_gelu(*mine, approximate=approximate), F.gelu(theirs[0], approximate=approximate)
    agree(got, want, mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["fast_gelu", "npu_fast_gelu"])
def test_fast_gelu(wheel, name):
    mine, theirs = leaves(torch.randn(5, 7) * 2, device="npu")
    agree(getattr(wheel, name)(*mine), theirs[0] * torch.sigmoid(1.702 * theirs[0]), mine, theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(wheel, reduction):
    mine, theirs = leaves(torch.randn(6, 9), device="npu")
    labels = torch.tensor([0, 8, 3, 3, 1, 7])
    loss = wheel.npu_cross_entropy_loss(*mine, labels.npu(), reduction=reduction)[0]
    agree(loss, F.cross_entropy(*theirs, labels, reduction=reduction).reshape(-1), mine, theirs)


def test_layer_norm_eval(wheel):
    x, weight, bias = torch.randn(3, 16), torch.randn(16), torch.randn(16)
    got = wheel.npu_layer_norm_eval(x.npu(), [16], weight.npu(), bias.npu())
    assert error(got, F.layer_norm(x, (16,), weight, bias)) <= 1e-5


# torch's own operators


def spectrum(x):
    return torch.stft(x.reshape(1, -1), 32, 16, window=torch.ones(32, device=x.device), return_complex=True).abs()


def ctc(x):
    labels = torch.tensor([[1, 2], [3, 1]], device=x.device)
    lengths = torch.tensor([8, 6]), torch.tensor([2, 1])
    return F.ctc_loss(x.reshape(8, 2, 20)[..., :5].log_softmax(-1), labels, *lengths)


def scattered(x):
    y = x.clone()
    y[:, 1] = 3.0
    y[y > 1] *= 2
    return y.index_add(0, torch.tensor([0, 1], device=x.device), x[2:4])


OPERATORS = {
    "linear": lambda x: F.linear(x, x[:3]),
    "conv1d": lambda x: F.conv1d(x.reshape(2, 8, 20), x.reshape(-1)[:48].reshape(2, 8, 3), stride=2),
    "layer_norm": lambda x: F.layer_norm(x, (40,)),
    "rms_norm": lambda x: F.rms_norm(x, (40,)),
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(-1),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.tensor([0, -100, 3, 39, 1, 2, 5, 7], device=x.device)),
    "embedding": lambda x: F.embedding(torch.tensor([[1, 7], [1, 0]], device=x.device), x),
    "views": lambda x: x.view(2, 4, 40).transpose(0, 1).unfold(2, 5, 5).flatten(1)[:, ::2],
    "reductions": lambda x: torch.cat([x.mean(1), x.amax(1), x.std(1), x.logsumexp(1), x.cumsum(1)[:, 3]]),
    "sorting": lambda x: torch.cat([x.sort(-1).values, x.topk(3).values], -1),
    "scatter": scattered,
    "stft": spectrum,
    "ctc_loss": ctc,
    "einsum": lambda x: torch.einsum("ab,cb->ac", x, x * 2),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_of_torch(wheel, name):
    mine, theirs = leaves(torch.randn(8, 40), device="npu")
    agree(OPERATORS[name](*mine), OPERATORS[name](*theirs), mine, theirs)


def test_results_are_written_where_they_are_asked_for(wheel):
    x, y = torch.randn(3, 4).npu(), torch.empty(0).npu()
    assert torch.add(x, 1, out=y) is y
    assert error(y, x.cpu() + 1) == 0
    view = x[1]
    view.zero_()
    assert x[1].eq(0).all(), "a view shares its memory"
    assert torch.arange(3, device="npu").tolist() == [0, 1, 2]
    assert torch.tensor([1.5], device="npu").item() == 1.5


# How torch's attention is routed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, None),
        ({"is_causal": True}, SEEN["top left"][1]),
        ({"attn_mask": SEEN["padded"][1]}, SEEN["padded"][1]),
        ({"attn_mask": SEEN["padded"][1][:, :, :1]}, SEEN["padded"][1]),
    ],
    ids=["full", "causal", "mask", "mask that broadcasts"],
)
def test_scaled_dot_product_attention_is_fused(wheel, calls, dtype, options, allowed):
    mine, theirs = heads(dtype)
    got = F.scaled_dot_product_attention(*mine, enable_gqa=True, **on_npu(options))
    agree(got, plain(*theirs, allowed), mine, theirs, TOLERANCE[dtype])
    assert calls == {"npu_fusion_attention_v3": 1, "npu_fusion_attention_grad_v3": 1}


@pytest.mark.parametrize(
    ("shape", "options"),
    [((B, N, S, D), {"attn_mask": torch.zeros(B, 1, S, S)}), ((N, S, D), {}), ((1, 1, 2, 800), {})],
    ids=["float mask", "3-d", "too wide"],
)
def test_scaled_dot_product_attention_that_is_not_fused(wheel, calls, shape, options):
    mine, theirs = leaves(*(torch.randn(shape) for _ in range(3)), device="npu")
    got = F.scaled_dot_product_attention(*mine, **on_npu(options))
    agree(got, F.scaled_dot_product_attention(*theirs, **options), mine, theirs)
    assert not calls


# Training


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


@pytest.mark.parametrize("dtype", DTYPES[1:])
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
    mine, theirs = leaves(torch.randn(5), torch.randn(3), device="npu")
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


# Checkpoints, random numbers, the device


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


# What is refused


SMALL = {"q": (1, N, S, D), "k": (1, K, S, D), "t": (9, N, D), "u": (9, K, D)}


@pytest.mark.parametrize(
    ("rule", "call"),
    [
        ("mask-is-given", lambda npu, q, k, t, u: npu.npu_fusion_attention(q, k, k, N, "BNSD", scale=1, sparse_mode=3)),
        ("scale-is-passed", lambda npu, q, k, t, u: npu.npu_fusion_attention(q, k, k, N, "BNSD")),
        ("scale-is-passed", lambda npu, q, k, t, u: npu.npu_fusion_attention_v3(q, k, k, N, "BNSD")),
        ("head-count-is-the-shape's", lambda npu, q, k, t, u: npu.npu_fusion_attention(q, k, k, K, "BNSD", scale=0.2)),
        (
            "no-leading-zero",
            lambda npu, q, k, t, u: npu.npu_fusion_attention(
                t, u, u, N, "TND", scale=0.2, actual_seq_qlen=[0, 4, 9], actual_seq_kvlen=[0, 4, 9]
            ),
        ),
        ("dtype-is-supported", lambda npu, q, k, t, u: infer(npu, 1, q.detach(), k, k)),
        ("inference-only", lambda npu, q, k, t, u: infer(npu, 1, q.half(), k.half(), k.half())),
        ("gamma-has-input-dtype", lambda npu, q, k, t, u: npu.npu_rms_norm(q.half(), q[0, 0, 0])),
        ("swiglu-is-even", lambda npu, q, k, t, u: npu.npu_swiglu(q[..., :3])),
        (
            "target-is-a-class",
            lambda npu, q, k, t, u: npu.npu_cross_entropy_loss(t[:, 0], (t[:, 0, 0] * 0 - 100).long()),
        ),
        ("one-device", lambda npu, q, k, t, u: npu.npu_fusion_attention(q, k.cpu(), k, N, "BNSD", scale=0.2)),
        ("no-reference", lambda npu, q, k, t, u: npu.npu_fusion_attention(q, k, k, N, "BNSD", sink=q[0, :, 0, 0])),
    ],
)
def test_refused_by_its_rule(wheel, rule, call):
    tensors = {name: torch.randn(shape).npu() for name, shape in SMALL.items()}
    tensors["q"].requires_grad_()
    with pytest.raises(RuntimeError) as refusal:
        call(wheel, **tensors)
    assert f"[{rule}]" in str(refusal.value)


def test_an_operator_without_a_kernel_does_not_give_numbers(wheel):
    x = torch.randn(1, 2, 4, 64).npu().half()
    ask = lambda: wheel.npu_prompt_flash_attention(x, x, x, num_heads=2, input_layout="BNSD").cpu()  # noqa: E731
    with pytest.raises(RuntimeError):
        ask()


BARE = """
import json
import torch, torch_npu

make = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="npu")
attend, N = torch_npu.npu_fusion_attention, 8
q, k, mask = make(2, N, 64, 128), make(2, 2, 64, 128), make(2048, 2048, dtype=torch.bool)
t, u, ends = make(100, N, 128), make(100, 2, 128), {"actual_seq_qlen": [40, 100], "actual_seq_kvlen": [40, 100]}
zero = {name: [0, *value] for name, value in ends.items()}
calls = {
    "right": lambda: attend(q, k, k, N, "BNSD"),
    "layout": lambda: attend(q, k, k, N, "BHSD"),
    "no heads": lambda: attend(q, k, k, 0, "BNSD"),
    "wrong heads": lambda: attend(q, k, k, 9, "BNSD"),
    "keep_prob": lambda: attend(q, k, k, N, "BNSD", keep_prob=1.5),
    "dense mode 7": lambda: attend(q, k, k, N, "BNSD", atten_mask=mask, sparse_mode=7),
    "packed mode 5": lambda: attend(t, u, u, N, "TND", atten_mask=mask, sparse_mode=5, **ends),
    "no lengths": lambda: attend(t, u, u, N, "TND"),
    "leading zero": lambda: attend(t, u, u, N, "TND", **zero),
    "other device": lambda: attend(q, k.cpu(), k, N, "BNSD"),
    "float mask": lambda: attend(q, k, k, N, "BNSD", atten_mask=make(2048, 2048), sparse_mode=3),
    "no mask": lambda: attend(q, k, k, N, "BNSD", sparse_mode=3),
}
said = {}
for name, call in calls.items():
    try:
        call()
    except Exception as error:
        said[name] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="session")
def host_checks():
    """What the wheel's own C++ says to each call, without any kernel of the emulator."""
    bare = {name: value for name, value in os.environ.items() if name != "NPU_EMULATOR"}
    command = [sys.executable, "-c", BARE]
    done = subprocess.run(command, capture_output=True, text=True, env={**bare, "ASCEND_LAUNCH_BLOCKING": "1"})
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("call", ["right", "wrong heads", "leading zero", "float mask", "no mask"])
def test_the_wheel_leaves_it_to_the_device(host_checks, call):
    """So these are in the emulator's rules: the call gets as far as asking for a kernel, wrong or not."""
    assert "libopapi" in host_checks[call]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("layout", "input_layout"),
        ("no heads", "head_num"),
        ("keep_prob", "keep_prob"),
        ("dense mode 7", "sparse_mode"),
        ("packed mode 5", "sparse_mode"),
        ("no lengths", "actual_seq"),
        ("other device", "device"),
    ],
)
def test_the_wheel_checks_it_on_the_host(host_checks, call, words):
    assert "libopapi" not in host_checks[call]
    assert words.lower() in host_checks[call].lower()


def test_the_call_log_shows_the_fused_path(tmp_path):
    program = "import torch, torch_npu; torch_npu.npu_swiglu(torch.ones(2, 4).npu())"
    log = tmp_path / "calls"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "NPU_EMULATOR_CALL_LOG": str(log)})
    (line,) = map(json.loads, log.read_text().splitlines())
    assert line["fused"] == {"npu_swiglu": 1}


def test_other_projects_see_nothing_of_ours():
    """What a program started on the emulated device finds on its path is one folder with one file."""
    added = os.environ["PYTHONPATH"].split(os.pathsep)[0]
    assert [path.name for path in Path(added).iterdir() if path.suffix] == ["sitecustomize.py"]

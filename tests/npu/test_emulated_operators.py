"""The torch_npu wheel on the emulated device against plain torch on the CPU.

Real: Python, schemas, autograd formulas, autocast lists, routing of attention, optimizer, allocator, host checks.
Emulated: what a kernel computes. So these tests hold a caller's use of torch_npu to account, not the hardware.
"""

import plain_formulas as formulas
import pytest
import torch
import torch.nn.functional as F
from npu_emulator.explain import TOLERANCE, error

pytestmark = pytest.mark.emulated_npu


@pytest.mark.parametrize("dtype", formulas.DTYPES)
def test_rms_norm(wheel, dtype):
    mine, theirs = formulas.leaves(torch.randn(2, 5, 48) * 3, 1 + 0.3 * torch.randn(48), dtype=dtype, device="npu")
    y, rstd = wheel.npu_rms_norm(*mine, epsilon=1e-5)
    assert rstd.dtype == torch.float32
    formulas.agree(y, F.rms_norm(theirs[0], (48,), theirs[1], 1e-5), mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", formulas.DTYPES)
def test_add_rms_norm(wheel, dtype):
    mine, theirs = formulas.leaves(
        *(torch.randn(shape) for shape in ((3, 16), (3, 16), (16,))), dtype=dtype, device="npu"
    )
    with torch.no_grad():
        y, _, total = wheel.npu_add_rms_norm(*mine)
    assert error(total, theirs[0] + theirs[1]) <= TOLERANCE[dtype]
    assert error(y, F.rms_norm(theirs[0] + theirs[1], (16,), theirs[2], 1e-6)) <= TOLERANCE[dtype]
    with pytest.raises(RuntimeError, match="inference-only"):
        wheel.npu_add_rms_norm(*mine)


@pytest.mark.parametrize("dtype", formulas.DTYPES)
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("tables", [(1, 1, 5, 8), (1, 5, 1, 8)])
def test_rotary(wheel, mode, tables, dtype):
    angle = torch.rand(*tables[:3], 4) * 6
    wide = angle.repeat_interleave(2, -1) if mode == "interleave" else angle.repeat(1, 1, 1, 2)
    shape = [2, 3, 3, 8]
    shape[tables.index(5)] = 5
    mine, theirs = formulas.leaves(torch.randn(shape), dtype=dtype, device="npu")
    tables = (x.npu().to(dtype) for x in (wide.cos(), wide.sin()))
    want = formulas.complex_rotation(theirs[0], angle, mode == "interleave")
    formulas.agree(wheel.npu_rotary_mul(*mine, *tables, mode), want, mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", formulas.DTYPES)
@pytest.mark.parametrize("dim", [-1, 0])
def test_swiglu(wheel, dim, dtype):
    mine, theirs = formulas.leaves(torch.randn(6, 10), dtype=dtype, device="npu")
    gate, up = theirs[0].tensor_split(2, dim)
    formulas.agree(wheel.npu_swiglu(*mine, dim=dim), F.silu(gate) * up, mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", formulas.DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(wheel, approximate, dtype):
    mine, theirs = formulas.leaves(torch.randn(5, 7) * 2, dtype=dtype, device="npu")
    got, want = wheel.npu_gelu(*mine, approximate=approximate), F.gelu(theirs[0], approximate=approximate)
    formulas.agree(got, want, mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["fast_gelu", "npu_fast_gelu"])
def test_fast_gelu(wheel, name):
    mine, theirs = formulas.leaves(torch.randn(5, 7) * 2, device="npu")
    formulas.agree(getattr(wheel, name)(*mine), theirs[0] * torch.sigmoid(1.702 * theirs[0]), mine, theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(wheel, reduction):
    mine, theirs = formulas.leaves(torch.randn(6, 9), device="npu")
    labels = torch.tensor([0, 8, 3, 3, 1, 7])
    loss = wheel.npu_cross_entropy_loss(*mine, labels.npu(), reduction=reduction)[0]
    formulas.agree(loss, F.cross_entropy(*theirs, labels, reduction=reduction).reshape(-1), mine, theirs)


def test_layer_norm_eval(wheel):
    x, weight, bias = torch.randn(3, 16), torch.randn(16), torch.randn(16)
    got = wheel.npu_layer_norm_eval(x.npu(), [16], weight.npu(), bias.npu())
    assert error(got, F.layer_norm(x, (16,), weight, bias)) <= 1e-5


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
    mine, theirs = formulas.leaves(torch.randn(8, 40), device="npu")
    formulas.agree(OPERATORS[name](*mine), OPERATORS[name](*theirs), mine, theirs)


def test_results_are_written_where_they_are_asked_for(wheel):
    x, y = torch.randn(3, 4).npu(), torch.empty(0).npu()
    assert torch.add(x, 1, out=y) is y
    assert error(y, x.cpu() + 1) == 0
    view = x[1]
    view.zero_()
    assert x[1].eq(0).all(), "a view shares its memory"
    assert torch.arange(3, device="npu").tolist() == [0, 1, 2]
    assert torch.tensor([1.5], device="npu").item() == 1.5

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from osum_npu.models.dropout import Dropout


@pytest.mark.parametrize("p", [0.003, 0.1, 0.5, 0.9])
def test_elements_are_dropped_one_by_one_at_the_rate(p):
    """Each of the four elements that share a number, and each pair of them, is dropped as chance would have it."""
    torch.manual_seed(0)
    kept = Dropout(p).train()(torch.ones(4 * 500_000)).ne(0).float().view(-1, 4)
    scatter = 5 * (p * (1 - p) / len(kept)) ** 0.5
    assert kept.mean(0).tolist() == pytest.approx([1 - p] * 4, abs=scatter)
    together = (kept.T @ kept / len(kept))[~torch.eye(4, dtype=torch.bool)]
    assert together.tolist() == pytest.approx([(1 - p) ** 2] * 12, abs=5 * 0.5 / len(kept) ** 0.5)
    following = (kept[1:] * kept[:-1]).mean(0)
    assert following.tolist() == pytest.approx([(1 - p) ** 2] * 4, abs=5 * 0.5 / len(kept) ** 0.5)


@given(
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    p=st.sampled_from([0.0, 1e-6, 0.25, 0.75]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_what_is_kept_is_scaled_and_so_is_its_gradient(shape, p, dtype):
    x = torch.full(shape, 2.0, dtype=dtype, requires_grad=True)
    out = Dropout(p).train()(x)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    out.sum().backward()
    factor = out.detach() / 2
    assert torch.equal(x.grad, factor)
    expected = torch.tensor([0, 1 / (1 - p)], dtype=torch.float64)
    nearest = (factor.double()[..., None] - expected).abs().amin(-1)
    assert not nearest.numel() or nearest.max() < (1e-4 if dtype is not torch.bfloat16 else 1e-2)


def test_the_seed_decides_and_evaluation_changes_nothing():
    x, layer = torch.randn(3, 50), Dropout(0.5)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(layer.train()(x))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(layer.eval()(x), x)
    assert isinstance(layer, nn.Dropout)

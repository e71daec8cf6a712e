"""Muon by matrices of one shape together, against torch's one by one."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.training.muon import Muon, orthogonalize, orthogonalize_all, orthogonalize_shared, share_out

SHAPES = [(8, 8), (8, 24), (24, 8), (8, 8), (16, 8), (1, 8)]


def learn(make, device="cpu", steps=4):
    """Parameters after steps with random gradients; the second has none in the first step, the last never."""
    rng = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=rng).to(device)) for shape in (*SHAPES, (3, 3))]
    optimizer = make(parameters)
    for step in range(steps):
        for i, parameter in enumerate(parameters[:-1]):
            gradient = torch.randn(parameter.shape, generator=rng).to(device)
            parameter.grad = None if step == 0 and i == 1 else gradient
        optimizer.step()
    return parameters, optimizer


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
def test_steps_are_those_of_torch():
    mine, _ = learn(lambda matrices: Muon(matrices, 0.02, weight_decay=0.1, dtype=torch.bfloat16))  # as torch
    options = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    theirs, _ = learn(lambda matrices: torch.optim.Muon(matrices, **options))
    for got, want in zip(mine, theirs):
        assert torch.allclose(got, want, rtol=0, atol=1e-3 * 0.02)


@settings(deadline=None)
@given(rows=st.integers(1, 12), more=st.integers(0, 12), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
def test_singular_values_come_near_one(rows, more, scale, seed):
    rng = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(2, rows, rows, generator=rng)).Q
    v = torch.linalg.qr(torch.randn(2, rows + more, rows, generator=rng)).Q
    values = torch.rand(2, rows, generator=rng) + 0.5
    x_NRC = scale * (u * values[:, None]) @ v.mT
    got = orthogonalize(x_NRC).float()
    assert got.shape == x_NRC.shape
    found = torch.linalg.svdvals(got)
    assert found.min() > 0.6
    assert found.max() < 1.35
    assert torch.einsum("nrc,nrc->n", got, x_NRC).gt(0).all(), "its direction is kept"


@pytest.mark.parametrize("size", [2, 3, 9])
def test_ranks_make_together_what_one_makes(size):
    """Every rank in turn, with what the others send; some of nine have nothing to do."""

    class Rank:
        def __init__(self, rank):
            self.rank, self.size = rank, size

        def collect(self, tensor):
            sent[self.rank] = tensor
            return [sent.get(rank, torch.zeros_like(tensor)) for rank in range(size)]

    matrices, sent = [torch.randn(shape) for shape in SHAPES], {}
    want = orthogonalize_all(matrices)
    for _ in range(2):  # in the second round, all has been sent
        made = [orthogonalize_shared(matrices, Rank(rank)) for rank in range(size)]
    assert all(torch.equal(a, b) for got in made for a, b in zip(got, want, strict=True))


@given(work=st.lists(st.integers(0, 1000), max_size=40), ranks=st.integers(1, 9))
def test_no_rank_has_more_work_than_a_fair_share_and_a_piece(work, ranks):
    owners = share_out(work, ranks)
    loads = [sum(w for w, owner in zip(work, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(loads) <= sum(work) / ranks + max(work, default=0)


def test_nothing_but_matrices():
    with pytest.raises(ValueError, match=r"matrices.*\[3\]"):
        Muon([torch.nn.Parameter(torch.zeros(3))], 0.1)


def test_state_comes_back():
    parameters, optimizer = learn(lambda matrices: Muon(matrices, 0.02))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    other = Muon(twins, 0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, twin in zip(parameters, twins):
        parameter.grad = twin.grad = torch.ones_like(parameter)
    optimizer.step()
    other.step()
    assert all(torch.equal(parameter, twin) for parameter, twin in zip(parameters, twins))

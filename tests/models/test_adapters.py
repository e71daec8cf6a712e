import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from osum_npu.models.adapters import AdapterBlock, CausalDownsampling, OsumAdapter, OsumAdapterConfig
from osum_npu.parity import relative_error

WIDTH = 24


def make(**sizes):
    torch.manual_seed(0)
    config = OsumAdapterConfig(**{"layers": 2, "heads": 3, "feed_forward": 40, "max_positions": 30, **sizes})
    adapter = OsumAdapter(config, WIDTH, llm_width=20).eval()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return adapter


ADAPTER = make()


@pytest.mark.parametrize("frames", range(1, 34))
def test_lengths(frames):
    length = math.ceil(math.ceil(frames / 2) / 2)
    embeddings, lengths = ADAPTER(torch.randn(frames, WIDTH), [frames])
    assert embeddings.shape == (length, 20)
    assert lengths == (length,) == (ADAPTER.length(frames),)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 13, 16])
@pytest.mark.parametrize("strides", [(1, 2, 2), (1, 1, 2), (2, 3, 1)])
def test_convolutions_see_no_later_frame(frames, strides):
    down = CausalDownsampling(WIDTH, strides)
    step = math.prod(strides)
    x = torch.randn(frames, WIDTH)
    before = down(x, [frames])
    for changed in range(frames):
        later = x.clone()
        later[changed:] += torch.randn(frames - changed, WIDTH)
        after = down(later, [frames])
        seen = [step * place >= changed for place in range(len(before))]  # output e ends at frame 4e of OSUM's
        assert (before != after).any(-1).tolist() == seen


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
    st.sampled_from([(1, 2, 2), (1, 1, 2), (2, 3, 1), (3, 1, 1)]),
    st.integers(0, 10**6),
)
def test_batch_equals_one_by_one(lengths, strides, seed):
    torch.manual_seed(seed)
    adapter = make(strides=strides, max_positions=60)
    frames = [torch.randn(n, WIDTH) for n in lengths]
    together, counts = adapter(torch.cat(frames), lengths)
    for part, x in zip(together.split(counts), frames, strict=True):
        alone, _ = adapter(x, [len(x)])
        assert relative_error(part, alone) <= 1e-5


def test_another_utterance_of_the_batch_changes_nothing():
    mine, other = (torch.randn(n, WIDTH, requires_grad=True) for n in (13, 22))
    together, counts = ADAPTER(torch.cat([other, mine, other]), [22, 13, 22])
    together.split(counts)[1].square().sum().backward()
    assert not other.grad.any()
    assert mine.grad.abs().amin(1).gt(0).all(), "some frame is not heard"


def test_block_is_torch_s_own_encoder_layer():
    torch.manual_seed(0)
    block = AdapterBlock(WIDTH, heads=3, feed_forward=40, dropout=0.0)
    layer = nn.TransformerEncoderLayer(WIDTH, 3, 40, 0.0, activation="relu", batch_first=True, norm_first=True)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    own = dict(block.state_dict())
    for kind in ("weight", "bias"):
        stacked = torch.cat([own.pop(f"{name}.{kind}") for name in ("query", "key", "value")])
        own[f"self_attn.in_proj_{kind}"] = stacked
        own[f"self_attn.out_proj.{kind}"] = own.pop(f"out.{kind}")
        own[f"linear1.{kind}"] = own.pop(f"feed_forward.0.{kind}")
        own[f"linear2.{kind}"] = own.pop(f"feed_forward.2.{kind}")
    layer.load_state_dict(own)
    x = torch.randn(3, 9, WIDTH)
    inside = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    got, want = block(x[inside], (9, 4, 1)), layer(x, src_key_padding_mask=~inside)[inside]
    assert relative_error(got, want) <= 1e-5


def test_positions_alternate_sine_and_cosine():
    # The position is all that tells two equal frames apart, so a wrong table shows in no other test of this file.
    for place in (0, 1, 17, 29):
        for channel in range(0, WIDTH, 2):
            angle = place / 10_000 ** (channel / WIDTH)
            pair = ADAPTER.positions[place, channel : channel + 2].tolist()
            assert pair == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-5)


@pytest.mark.parametrize(("llm_width", "millions"), [(3584, 51.96), (4096, 52.49)])
def test_size_is_osum_s(llm_width, millions):
    with torch.device("meta"):
        adapter = OsumAdapter(OsumAdapterConfig(), 1024, llm_width)
    assert round(sum(p.numel() for p in adapter.parameters()) / 1e6, 2) == millions


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 24 is not divisible by 5 heads"):
        make(heads=5)

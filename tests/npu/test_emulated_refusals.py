"""What the emulated device refuses, what the wheel refuses itself, and what a program sees of the emulator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import plain_formulas as formulas
import pytest
import torch

pytestmark = [pytest.mark.emulated_npu, pytest.mark.emulator_only]


SMALL = {
    "q": (1, formulas.N, formulas.S, formulas.D),
    "k": (1, formulas.K, formulas.S, formulas.D),
    "t": (9, formulas.N, formulas.D),
    "u": (9, formulas.K, formulas.D),
}


@pytest.mark.parametrize(
    ("rule", "call"),
    [
        (
            "mask-is-given",
            lambda npu, q, k, t, u: npu.npu_fusion_attention(q, k, k, formulas.N, "BNSD", scale=1, sparse_mode=3),
        ),
        ("scale-is-passed", lambda npu, q, k, t, u: npu.npu_fusion_attention(q, k, k, formulas.N, "BNSD")),
        ("scale-is-passed", lambda npu, q, k, t, u: npu.npu_fusion_attention_v3(q, k, k, formulas.N, "BNSD")),
        (
            "head-count-is-the-shape's",
            lambda npu, q, k, t, u: npu.npu_fusion_attention(q, k, k, formulas.K, "BNSD", scale=0.2),
        ),
        (
            "no-leading-zero",
            lambda npu, q, k, t, u: npu.npu_fusion_attention(
                t, u, u, formulas.N, "TND", scale=0.2, actual_seq_qlen=[0, 4, 9], actual_seq_kvlen=[0, 4, 9]
            ),
        ),
        ("dtype-is-supported", lambda npu, q, k, t, u: formulas.infer(npu, 1, q.detach(), k, k)),
        ("inference-only", lambda npu, q, k, t, u: formulas.infer(npu, 1, q.half(), k.half(), k.half())),
        ("gamma-has-input-dtype", lambda npu, q, k, t, u: npu.npu_rms_norm(q.half(), q[0, 0, 0])),
        ("swiglu-is-even", lambda npu, q, k, t, u: npu.npu_swiglu(q[..., :3])),
        (
            "target-is-a-class",
            lambda npu, q, k, t, u: npu.npu_cross_entropy_loss(t[:, 0], (t[:, 0, 0] * 0 - 100).long()),
        ),
        ("one-device", lambda npu, q, k, t, u: npu.npu_fusion_attention(q, k.cpu(), k, formulas.N, "BNSD", scale=0.2)),
        (
            "no-reference",
            lambda npu, q, k, t, u: npu.npu_fusion_attention(q, k, k, formulas.N, "BNSD", sink=q[0, :, 0, 0]),
        ),
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

"""The loss of a language model's head: ours, plain torch, cut-cross-entropy and Liger's chunked log-probabilities.

Usage: mas-hpc bench kernels. Needs the extra bench. CPU only; N targets, V vocabulary, D hidden size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from mas_hpc_kernels import linear_logprob
from reporting import Row, alternate, cost_row, cpu_seconds, report, versions
from torch import Tensor

from mas_hpc.training.losses.policy_gradient import Clip, policy_loss

NUM_TARGETS, HIDDEN, VOCABULARY = 2048, 576, 49152
SHAPE = f"N={NUM_TARGETS}, D={HIDDEN}, V={VOCABULARY}, float32"
MODES = {"trained head": (True, True), "frozen head": (True, False), "no gradient": (False, False)}
"""Whether hidden states and head need gradients."""
PEERS = {
    "naive": "plain torch (log_softmax, gather, entropy)",
    "cce": f"cut-cross-entropy {versions(['cut-cross-entropy']).get('cut-cross-entropy')}, torch_compile; no entropy",
    "liger": f"liger-kernel {versions(['liger-kernel']).get('liger-kernel')}, chunked log-prob of its losses; no entropy",
}
PROMISED = {
    ("trained head", "cpu_s"): 1 / 1.25, ("trained head", "peak_mib"): 6.0,
    ("frozen head", "cpu_s"): 1 / 0.72, ("frozen head", "peak_mib"): 8.0,
}  # fmt: skip
"""Least ratios to plain torch; elsewhere: no worse than the peer."""
NOTES = {
    "work": "log-probability of each target, forward and, unless said otherwise, backward; ours and plain torch also give the "
    "entropy of each row",
    "cpu_s": "process CPU seconds, one thread, median of 3 repeats in alternation (ours, plain, cce, liger, ours, ...), after "
    "a smaller call that warms up and compiles",
    "peak_mib": "a fresh process for each, after a smaller call: VmHWM at the end minus VmRSS before, so the gradient of the "
    "head (108 MiB) is in it; default allocator settings",
    "epilogue": "the clipped policy loss with its metrics, forward and backward from given log-probabilities, in plain torch: "
    "a fused kernel could save at most that, so there is none",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Random ones; logits of about one unit.

    Example: Inputs(hidden_ND=torch.zeros(2, 3), weight_VD=torch.zeros(5, 3), target_N=torch.tensor([0, 4]))
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor


def make(num_targets: int, hidden: int, vocabulary: int) -> Inputs:
    """The same each time."""
    generator = torch.Generator().manual_seed(0)
    return Inputs(
        hidden_ND=torch.randn(num_targets, hidden, generator=generator),
        weight_VD=torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5,
        target_N=torch.randint(vocabulary, (num_targets,), generator=generator),
    )


def naive(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """All logits at once."""
    logprob_NV = (hidden_ND @ weight_VD.T).log_softmax(-1)
    with torch.no_grad():
        _ = -(logprob_NV.exp() * logprob_NV).sum(-1)
    return logprob_NV.gather(1, target_N[:, None])[:, 0]


def cut_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Needs the extra bench, as the next one."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden_ND, weight_VD, target_N, impl="torch_compile", reduction="none")


def liger(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """The chunked log-probabilities of its preference and policy losses."""
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    return _ChunkedSelectiveLogProbFunction.apply(hidden_ND, weight_VD, target_N, None, 1.0, 4096)


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": lambda hidden_ND, weight_VD, target_N: linear_logprob(hidden_ND, weight_VD, target_N)[0],
    "naive": naive,
    "cce": cut_cross_entropy,
    "liger": liger,
}


def step(method: str, mode: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """Log-probabilities and the gradients that the mode needs."""
    hidden_ND, weight_VD = (
        tensor.detach().requires_grad_(needed)
        for tensor, needed in zip((inputs.hidden_ND, inputs.weight_VD), MODES[mode], strict=True)
    )
    with torch.set_grad_enabled(hidden_ND.requires_grad):
        logprob_N = METHODS[method](hidden_ND, weight_VD, inputs.target_N)
    if not hidden_ND.requires_grad:
        return (logprob_N,)
    leaves = [leaf for leaf in (hidden_ND, weight_VD) if leaf.requires_grad]
    return logprob_N.detach(), *torch.autograd.grad(logprob_N, leaves, torch.linspace(-1, 1, len(logprob_N)))


def warm_up(method: str, mode: str) -> None:
    """Another size than the measured one: what is compiled has to serve both."""
    step(method, mode, make(33, HIDDEN, 1000))


def check(mode: str) -> None:
    """All methods compute the same thing, or the comparison is none."""
    inputs = make(64, HIDDEN, VOCABULARY)
    expected = step("naive", mode, inputs)
    for method in METHODS:
        for ours, theirs in zip(step(method, mode, inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def time_rows(inputs: Inputs) -> list[Row]:
    """CPU seconds of each mode; scoring without gradients also against the whole training pass, as promised."""
    seconds: dict[tuple[str, str], float] = {}
    for mode in MODES:
        check(mode)
        for method in METHODS:
            warm_up(method, mode)
        works = [lambda method=method, mode=mode: cpu_seconds(lambda: step(method, mode, inputs)) for method in METHODS]
        seconds |= {(mode, method): value for method, value in zip(METHODS, alternate(works), strict=True)}
        print({method: round(seconds[mode, method], 2) for method in METHODS}, mode, flush=True)
    rows = [row(mode, "cpu_s", peer, seconds[mode, "ours"], seconds[mode, peer]) for mode in MODES for peer in PEERS]
    scoring, training = seconds["no gradient", "ours"], seconds["trained head", "naive"]
    case = f"no gradient, against forward and backward of a trained head: {SHAPE}"
    promised = cost_row(case=case, metric="cpu_s", ours=scoring, peer=PEERS["naive"], theirs=training, target=1 / 0.4)
    return [*rows, promised, epilogue_row(seconds["frozen head", "ours"])]


def epilogue_row(head_s: float) -> Row:
    """The policy loss against the cheaper of the passes that it follows."""
    logprob_N, old_N, advantage_N = torch.randn(3, NUM_TARGETS).mul_(0.1)
    sample_N = torch.arange(NUM_TARGETS) // 64

    def epilogue() -> None:
        leaf_N = logprob_N.detach().requires_grad_()
        clip = Clip(low=0.2, high=0.28)
        loss_N, _ = policy_loss(leaf_N, old_N, advantage_N, sample_N, NUM_TARGETS // 64, ratio="token", clip=clip)
        loss_N.sum().backward()

    epilogue()
    (seconds,) = alternate([lambda: cpu_seconds(lambda: [epilogue() for _ in range(100)]) / 100], repeats=5)
    case = f"policy loss after the head, N={NUM_TARGETS}"
    return cost_row(case=case, metric="cpu_s", ours=seconds, peer="our frozen head before it", theirs=head_s, target=100.0)


def row(mode: str, metric: str, peer: str, ours: float, theirs: float) -> Row:
    target = PROMISED.get((mode, metric), 1.0) if peer == "naive" else 1.0
    return cost_row(case=f"{mode}: {SHAPE}", metric=metric, ours=ours, peer=PEERS[peer], theirs=theirs, target=target)


def memory_rows() -> list[Row]:
    """Peak memory above the inputs."""
    peak = {(mode, method): _fresh_peak(method, mode) for mode in MODES for method in METHODS}
    return [row(mode, "peak_mib", peer, peak[mode, "ours"], peak[mode, peer]) for mode in MODES for peer in PEERS]


def _fresh_peak(method: str, mode: str) -> float:
    command = [sys.executable, __file__, "--peak", method, mode]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def peak_mib(method: str, mode: str) -> float:
    """Of this process, above what it has before the step."""
    inputs = make(NUM_TARGETS, HIDDEN, VOCABULARY)
    warm_up(method, mode)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before_kib = _memory_kib("VmRSS")
    step(method, mode, inputs)
    return (_memory_kib("VmHWM") - before_kib) / 1024


def _memory_kib(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0])


def main() -> None:
    """Measure everything, or with --peak the memory of one step in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", nargs=2, metavar=("METHOD", "MODE"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(json.dumps(peak_mib(*arguments.peak)))
        return
    rows = [*memory_rows(), *time_rows(make(NUM_TARGETS, HIDDEN, VOCABULARY))]
    print(report("kernels", rows, notes=NOTES).name)


if __name__ == "__main__":
    main()

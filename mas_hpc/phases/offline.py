"""Methods on data that exists: SFT, reward models, process reward models and the DPO family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isnan

from mas_hpc.config_methods import DPOConfig, OfflineMethod, ProcessRewardConfig, SFTConfig
from mas_hpc.data.steps import first_error, first_error_f1
from mas_hpc.distributed.checkpoint_files import Phase
from mas_hpc.models.heads import ScalarHead
from mas_hpc.phases.examples import Source, build_source
from mas_hpc.phases.keeping import Keeper
from mas_hpc.phases.monitor import Monitor
from mas_hpc.run import Run
from mas_hpc.training.learner import Learner
from mas_hpc.training.losses.dpo import REFERENCE_FREE
from mas_hpc.training.methods import Objective, offline_objective
from mas_hpc.training.network import Network
from mas_hpc.training.offline import fit_offline
from mas_hpc.training.reference import COLUMN, with_reference
from mas_hpc.types import Sample


def fit_offline_method(run: Run, method: OfflineMethod, phase: Phase) -> Network:
    """Train on the data that exists and return the network, with its scalar head if the method has one."""
    source = build_source(run, method, phase)
    objective = offline_objective(method)
    network = run.network(head=None if objective.logprob else ScalarHead(run.model.config.hidden_size, seed=run.config.seed))
    noise_alpha = method.neftune_alpha if isinstance(method, SFTConfig) else 0.0
    learner = Learner(network, run.strategy, method, noise_alpha=noise_alpha, timer=run.timer)
    if isinstance(method, DPOConfig):
        source = with_references(run, source, network, learner, method)
    measure = partial(held_out_metrics, run, learner, objective, source, method)
    monitor = Monitor(
        run, phase, method.steps, title=method.kind, weights=learner, eval_every=method.eval_every,
        held_out=measure if phase == "train" else None,
    )  # fmt: skip
    keeper = Keeper(run, phase, method.steps, {"policy": learner}, monitor)
    start = keeper.restore()
    with monitor:
        fit_offline(
            batch=source.batch, learner=learner, objective=objective, log=monitor.log, look=monitor.look, keep=keeper.keep,
            steps=range(start, method.steps),
        )  # fmt: skip
    learner.publish(needed=run.world.is_first)
    return network


def held_out_metrics(
    run: Run, learner: Learner, objective: Objective, source: Source, method: OfflineMethod
) -> Mapping[str, float]:
    """The objective's own metrics on held-out examples; for a PRM also how well it finds the first error (ProcessBench)."""
    samples = source.held_out()
    metrics = learner.evaluate(samples, objective)
    if not isinstance(method, ProcessRewardConfig):
        return metrics
    scored = learner.network.annotate(samples, run.strategy.world, column="score", read="score")
    pairs = [
        (first_error(found), first_error(judged, threshold=0.5))
        for found, judged in ((_at_steps(sample, "score"), _at_steps(sample, "label")) for sample in scored)
        if judged
    ]
    return metrics | first_error_f1(pairs)


def _at_steps(sample: Sample, column: str) -> list[float]:
    mask = sample.loss_mask or (True,) * len(sample.completion_ids)
    return [value for value, is_step in zip(sample.columns[column], mask, strict=True) if is_step]


# ---- DPO


def with_references(run: Run, source: Source, network: Network, learner: Learner, method: DPOConfig) -> Source:
    """The samples of all steps with the log-probs of the policy as it is now, computed once or found on disk.

    The learner, which has taken no step, computes them: only there does every model have weights.
    """
    kto = "kto" in method.losses
    if not kto and (method.reference_free or REFERENCE_FREE.issuperset(method.losses)):
        return source
    batches = [source.batch(step) for step in range(method.steps)] + [source.held_out()]
    mismatched = [_mismatched(samples) if kto else [] for samples in batches]
    distinct = {_identity(sample): sample for part in (*batches, *mismatched) for sample in part}
    with run.console.status(f"log-probabilities of the reference: {len(distinct)} samples"):
        annotate = partial(learner.network.annotate, world=run.strategy.world)
        cache = run.folder.parent / ".reference"
        found = with_reference(list(distinct.values()), network, run.world, cache=cache, annotate=annotate)
    known = {identity: sample.columns[COLUMN] for identity, sample in zip(distinct, found, strict=True)}

    def attach(samples: Sequence[Sample]) -> list[Sample]:
        return [replace(s, columns={**s.columns, COLUMN: known[_identity(s)]}) for s in samples]

    def ready(number: int) -> list[Sample]:
        samples = attach(batches[number])
        return _with_kl(run, learner.network, samples, attach(mismatched[number])) if kto else samples

    return Source(batch=ready, held_out=lambda: ready(method.steps))


def _identity(sample: Sample) -> tuple[object, ...]:
    return sample.policy, sample.prompt_ids, sample.prompt_spans, sample.completion_ids, sample.loss_mask


def _mismatched(samples: Sequence[Sample]) -> list[Sample]:
    """Each prompt with a completion of another: what KTO estimates its KL from (arXiv 2402.01306, section 4.1).

    The other is half a batch away: the next sample may be the second answer to the same prompt.
    """
    half = len(samples) // 2
    others = [*samples[half:], *samples[:half]]
    return [replace(s, completion_ids=t.completion_ids, loss_mask=t.loss_mask) for s, t in zip(samples, others, strict=True)]


def _with_kl(run: Run, network: Network, samples: list[Sample], mismatched: list[Sample]) -> list[Sample]:
    """The column kl: the mean over the whole batch of log pi - log pi_ref of mismatched completions, in nats."""
    scored = network.annotate(mismatched, run.strategy.world, column="logprob", read="logprob")
    gaps = [a - b for s in scored for a, b in zip(s.columns["logprob"], s.columns[COLUMN], strict=True) if not isnan(a)]
    kl = sum(gaps) / len(scored)
    return [replace(s, columns={**s.columns, "kl": (kl,) * len(s.completion_ids)}) for s in samples]

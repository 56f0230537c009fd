"""Which job a configuration is for, where nobody says so, and whether it can do the one that somebody says."""

from __future__ import annotations

from dataclasses import dataclass

from mas_hpc.config import RunConfig
from mas_hpc.launch.plan import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A job and its reason.

    Example: choose_job(load_config("configs/mas.yaml", [])).why == "data.num_train=0 leaves nothing to train on"
    """

    job: Job
    why: str


def choose_job(config: RunConfig) -> Choice:
    """train where the configuration names a method and has data for it, rollout elsewhere."""
    method, data = config.method, config.data
    if config.unplayable:
        return Choice(job="train", why=f"data.kind={data.kind} has rows to learn from, and no questions")
    if not data.num_train:
        return Choice(job="rollout", why="data.num_train=0 leaves nothing to train on")
    if config.untrainable:
        return Choice(job="rollout", why="training cannot sample as rollout.temperature, top_p and top_k say")
    if "method" not in config.model_fields_set:
        return Choice(job="rollout", why="the configuration names no method")
    return Choice(job="train", why=f"method.kind={method.kind} with data.num_train={data.num_train}")


def unfit(job: Job, config: RunConfig) -> str:
    """Why the configuration cannot do the job, as every rank would say; empty when it can."""
    if job in ("train", "pipeline") and config.untrainable:
        return config.untrainable
    if job in ("train", "pipeline") and not config.data.num_train:
        return f"data.num_train=0: nothing to train on; set data.num_train, or --job {choose_job(config).job}"
    if job != "train" and config.unplayable:
        return config.unplayable
    if job == "pipeline" and config.method.kind in ("rm", "prm"):
        return f"method.kind={config.method.kind}: a reward model plays no episodes to evaluate; --job train"
    return ""

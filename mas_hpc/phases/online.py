"""Methods on what the team samples: PPO, GRPO and AT-GRPO. One loop; they differ in sampling, credit and critic."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mas_hpc.config_methods import ATGRPOConfig, GroupConfig, GRPOConfig, OnlineMethod, PPOConfig
from mas_hpc.credit_assignment.assign import to_samples, with_advantages, with_returns
from mas_hpc.credit_assignment.at_grpo import GroupSettings, at_grpo
from mas_hpc.credit_assignment.grpo import grpo, informative_tasks
from mas_hpc.credit_assignment.kl_control import MAX_ERROR, KLController
from mas_hpc.credit_assignment.shaping import token_rewards
from mas_hpc.data import trace_store
from mas_hpc.distributed.checkpoints import Part, Saved, State
from mas_hpc.errors import ConfigError
from mas_hpc.models.heads import ScalarHead
from mas_hpc.orchestration.sampling import Sampling, derive_seed
from mas_hpc.phases.batch import Batch, batch_metrics, print_completions, sampled_tokens, with_credit
from mas_hpc.phases.credit_training import with_credit_weights, with_sibling_credit
from mas_hpc.phases.examples import training_tasks
from mas_hpc.phases.keeping import Keeper
from mas_hpc.phases.monitor import Monitor
from mas_hpc.phases.reward import load_reward_model, read_card, rewarded
from mas_hpc.rollouts import how_to_play, play_all, play_counted
from mas_hpc.run import Run
from mas_hpc.serving import push
from mas_hpc.training.learner import Learner, in_lockstep
from mas_hpc.training.losses.kl import kl_estimate
from mas_hpc.training.methods import policy_objective
from mas_hpc.training.network import Network, TreeModule
from mas_hpc.training.online import Minibatch, Online, fit_online
from mas_hpc.training.share import Totals
from mas_hpc.types import Sample, Trace, Turn


def fit_online_method(run: Run, method: OnlineMethod) -> Network:
    """Collect, credit, learn and push, `method.steps` times; returns the trained network."""
    trainer = Trainer(run, method)
    monitor = Monitor(
        run, "train", method.steps, title=method.kind, weights=trainer.learner, eval_every=method.eval_every,
        held_out=trainer.held_out if method.eval_every else None, best="accuracy",
    )  # fmt: skip
    keeper = Keeper(run, "train", method.steps, trainer.parts, monitor)
    start = keeper.restore()
    if start:
        trainer.push(start)
    with monitor:
        loop = Online(
            collect=run.timer.timed("rollout", trainer.collect), credit=run.timer.timed("reward", trainer.credit),
            learn=trainer.learn, log=monitor.log, look=monitor.look, keep=keeper.keep, push=trainer.push,
        )  # fmt: skip
        fit_online(loop, range(start, method.steps))
    trainer.push(method.steps + 1)  # the best weights may not be the last
    return trainer.network


def check(run: Run, method: OnlineMethod) -> None:
    """Refuse what the questions, the dialect or the adapters do not allow, before anything is trained.

    Raises ConfigError, DataError, CheckpointError.
    """
    questions = training_tasks(run)
    if len(questions) < method.tasks_per_step:
        raise ConfigError(
            f"method.tasks_per_step={method.tasks_per_step}: there are {len(questions)} training questions; "
            f"set it to at most {len(questions)}, or raise data.num_train"
        )
    if method.reward_model:
        read_card(Path(method.reward_model))
    _check_horizon(run, method)
    if not run.team.template.stop_ids and (method.truncated != "keep" or method.overlong_buffer):
        raise ConfigError(
            f"method.truncated={method.truncated}, method.overlong_buffer={method.overlong_buffer}: the tiny model's turns "
            "have a fixed length and no end token; set truncated=keep and overlong_buffer=0"
        )
    if isinstance(method, GRPOConfig) and method.group_by == "task" and run.team.topology.votes and method.reward_model:
        raise ConfigError(
            f"method.reward_model={method.reward_model!r}: the team's answer is a vote, which no reward model scores; set "
            "method.group_by=agent, or leave it out"
        )
    replacing = isinstance(method, GroupConfig) and method.credit.method != "local" and method.credit.value == "replacement"
    if replacing and run.config.adapters.policies == "shared":
        raise ConfigError(
            "method.credit.value=replacement: without adapters nothing says which policy replaces an absent agent; set "
            "adapters.policies=per_agent, or another value"
        )
    if isinstance(method, PPOConfig) and method.critic == "separate" and run.config.adapters.policies == "per_agent":
        raise ConfigError(
            "method.critic=separate would train a second full model beside the adapters; set method.critic=shared and "
            "method.critic_warmup_steps=0"
        )
    if isinstance(method, ATGRPOConfig) and method.alpha and not method.team_rollouts and run.world.is_first:
        run.console.print(
            f"[yellow]method.alpha={method.alpha:g} with method.team_rollouts=0: siblings share one team reward, "
            "which group centring erases; only local rewards train. Set method.team_rollouts=1 or more.[/yellow]"
        )


def _check_horizon(run: Run, method: OnlineMethod) -> None:
    speakers = run.config.team.max_speakers
    sequences = method.tasks_per_step * speakers * (method.group_size if isinstance(method, GroupConfig) else 1)
    if method.kl.target and method.kl.horizon <= MAX_ERROR * sequences:
        raise ConfigError(
            f"method.kl.horizon={method.kl.horizon:g}: a step has {sequences} sequences, which could turn the coefficient "
            f"negative; set it above {MAX_ERROR * sequences:g}, 10000 is usual"
        )


class Trainer:
    """What one online method keeps from step to step: policy, critic, reference, KL coefficient and moving averages."""

    def __init__(self, run: Run, method: OnlineMethod) -> None:
        self.run, self.method = run, method
        critic = method.critic if isinstance(method, PPOConfig) else None
        head = ScalarHead(run.model.config.hidden_size, seed=run.config.seed) if critic else None
        self.reward_model = load_reward_model(run, method.reward_model) if method.reward_model else None
        self.network = run.network(head=head if critic == "shared" else None, temperature=run.config.rollout.temperature)
        frozen = self.network.copy() if method.kl.coefficient and not run.bank else None
        separate = run.network(head=head).copy() if critic == "separate" else None
        self.updates = method.updates_per_batch * method.minibatches
        self.learner = Learner(self.network, run.strategy, method, updates_per_batch=self.updates, timer=run.timer)
        self.policy = self.critic = self.learner.network
        self.reference = self._reference(frozen) if method.kl.coefficient else None
        self.critic_learner = None
        if isinstance(method, PPOConfig) and separate:
            optimization = method.model_copy(update={"learning_rate": method.critic_learning_rate})
            self.critic_learner = Learner(separate, run.strategy, optimization, updates_per_batch=self.updates, timer=run.timer)
            self.critic = self.critic_learner.network
        self.kl = KLController(
            coefficient=method.kl.coefficient, target=method.kl.target or None, horizon=method.kl.horizon
        )  # fmt: skip
        self.coefficient = self.kl.coefficient  # of the batch that is being learnt from
        self.baselines: dict[str, float] = {}

    def _reference(self, frozen: Network | None) -> Network:
        """The policy as it is now: a frozen copy, or the base model under the adapters."""
        if frozen is None:
            return self.policy
        frozen.model.requires_grad_(False)
        strategy = self.run.strategy
        return in_lockstep(frozen, strategy.freeze(TreeModule(frozen.model, None)), strategy)

    @property
    def parts(self) -> dict[str, Part]:
        """What a checkpoint holds."""
        critic = {"critic": self.critic_learner} if self.critic_learner else {}
        return {"policy": self.learner, **critic, "method": self}

    def state(self) -> State:
        """What carries over from step to step beside the learners."""
        return State(
            record={"kl": self.kl.coefficient, "coefficient": self.coefficient, "baselines": dict(self.baselines)}
        )  # fmt: skip

    def restore(self, saved: Saved) -> None:
        """Go on from a checkpoint."""
        record = saved.record
        self.kl = replace(self.kl, coefficient=record["kl"])
        self.coefficient, self.baselines = record["coefficient"], record["baselines"]

    def push(self, version: int) -> None:
        """Serve the weights that were trained as `version` from now on. Collective."""
        with self.run.timer.part("sync"):
            self.learner.publish()
            push(self.run, version)

    # ---- collect

    def collect(self, step: int) -> Batch:
        """Episodes of `tasks_per_step` questions; dynamic sampling puts others in place of those without variance."""
        method = self.method
        batch = self._play(step, 0, method.tasks_per_step)
        for number in range(1, 1 + (method.dynamic_sampling if isinstance(method, GRPOConfig) else 0)):
            batch = batch.only(informative_tasks(batch.traces, batch.outcomes))
            missing = method.tasks_per_step - len({trace.task.id for trace in batch.traces})
            if not missing:
                break
            batch = batch.joined(self._play(step, number, method.tasks_per_step), num_tasks=method.tasks_per_step)
        return batch

    def _play(self, step: int, number: int, num_tasks: int) -> Batch:
        run, method = self.run, self.method
        names = (step, number) if number else (step,)
        tasks = Random(derive_seed(run.config.seed, "tasks", *names)).sample(training_tasks(run), k=num_tasks)
        how = how_to_play(run, _sampling(run, method), derive_seed(run.config.seed, "train", *names))
        played = play_counted(run, tasks, how, label="train", step=step, keep=False, bar=False)
        with run.timer.part("reward"):
            traces, steps = rewarded(run, played.traces, method, self.reward_model)
        outcomes = [_outcome(run, trace) for trace in traces]
        costs: Mapping[str, float] = {}
        if _replays(method, "sibling"):
            assert isinstance(method, GroupConfig)
            with run.timer.part("reward"):
                traces, costs = with_sibling_credit(run, traces, method, step)
        tokens = sampled_tokens(traces) + costs.get("credit/tokens", 0.0)
        return Batch(
            step=step, traces=traces, outcomes=outcomes, steps=steps, credit=costs, tokens=tokens, account=played.account
        )  # fmt: skip

    # ---- credit

    def credit(self, batch: Batch) -> tuple[list[Minibatch], Mapping[str, float]]:
        """Advantages of turns or tokens, cut into the minibatches of all passes; and the metrics of the batch."""
        credited, weighing = self._weighed(batch.step, self._credited(batch))
        self.run.engine.sleep()
        samples = [sample for sample in to_samples(credited) if sample.policy not in self.run.config.team.models]
        metrics = {**batch_metrics(batch, self.method), **batch.credit, **weighing}
        metrics["tokens/sampled"] = batch.tokens + weighing.get("credit/tokens", 0.0)
        metrics |= batch.account.metrics() if batch.account else {}
        self._say_what_centring_erased(batch.step, metrics)
        samples, kl = self._with_reference(samples)
        if isinstance(self.method, PPOConfig) or _by_token(self.method):
            samples, credited = self._token_advantages(batch, samples, credited)
        if self.updates > 1 and self.method.mismatch != "none":
            samples = self.policy.annotate(samples, self.run.strategy.world, column="old_logprob", read="logprob")
        if self.run.world.is_first:
            trace_store.write(self.run.folder / "traces" / "train.jsonl", credited)
            if batch.step in (0, self.method.steps // 2, self.method.steps - 1):
                print_completions(self.run.console, credited, batch.step)
        return list(self._minibatches(batch.step, samples)), metrics | kl

    def _credited(self, batch: Batch) -> list[Trace]:
        method = self.method
        if isinstance(method, ATGRPOConfig):
            groups = GroupSettings(
                group_size=method.group_size, advantage=method.advantage, agent_weights=method.agent_weights,  # type: ignore[arg-type]
                balance_verdicts=method.balance_verdicts,
                penalties=self.reward_model is None and not _replays(method, "sibling"),
            )  # fmt: skip
            traces = at_grpo(batch.traces, groups)
        elif isinstance(method, GRPOConfig):
            traces, self.baselines = grpo(
                batch.traces, batch.outcomes, group_by=method.group_by, advantage=method.advantage, baselines=self.baselines,
                decay=method.rae_decay,
            )  # fmt: skip
        else:
            traces = [with_credit(trace, lambda turn: turn.reward if turn.committed else None) for trace in batch.traces]
        if method.truncated == "mask":
            traces = [with_credit(trace, lambda turn: None if turn.finish == "length" else turn.credit) for trace in traces]
        return traces

    def _weighed(self, step: int, traces: list[Trace]) -> tuple[list[Trace], Mapping[str, float]]:
        """Advantages times the size of their agents' credit, where the method asks for it."""
        if not _replays(self.method, "weight"):
            return traces, {}
        assert isinstance(self.method, GroupConfig)
        return with_credit_weights(self.run, traces, self.method, step)

    def _say_what_centring_erased(self, step: int, metrics: Mapping[str, float]) -> None:
        """Credit that is constant inside a group trains nothing: how much of it, at the first, middle and last step."""
        found = {name.partition("/")[2]: share for name, share in metrics.items() if name.startswith("erased_by_centring/")}
        if found and self.run.world.is_first and step in (0, self.method.steps // 2, self.method.steps - 1):
            shares = ", ".join(f"{share:.0%} of {agent}'s" for agent, share in found.items())
            self.run.console.print(f"credit: group centring erases {shares} variance, the rest trains", highlight=False)

    def _with_reference(self, samples: list[Sample]) -> tuple[list[Sample], dict[str, float]]:
        """The reference's log-probs, and the KL of a sequence by which the coefficient is adapted for the next batch."""
        if self.reference is None or not samples:
            return samples, {}
        samples = self.reference.annotate(
            samples, self.run.strategy.world, column="reference_logprob", read="logprob", base=self.run.bank is not None
        )  # fmt: skip
        kl = fmean(float(_kl_of(sample, "k1").sum()) for sample in samples)
        metrics = {"kl/sequence": kl, "kl/coefficient": self.kl.coefficient}
        self.coefficient, self.kl = self.kl.coefficient, self.kl.updated(kl, len(samples))
        return samples, metrics

    def _token_advantages(self, batch: Batch, samples: list[Sample], traces: list[Trace]) -> tuple[list[Sample], list[Trace]]:
        """Columns `advantage` and, with a critic, `return`."""
        method = self.method
        keys, steps = trajectories(method, traces, samples), batch.steps
        if isinstance(method, GRPOConfig) and method.group_by == "task":  # the steps of other answers are not in the outcome
            answers = [_answer(self.run, trace) for trace in traces]
            steps = {turn.id: steps[turn.id] for turn in answers if turn and turn.id in steps}
        rewards = [self._rewards(sample, steps.get(sample.id)) for sample in samples]
        if isinstance(method, PPOConfig):
            samples = self.critic.annotate(samples, self.run.strategy.world, column="old_value", read="score")
            samples = with_advantages(
                samples, keys, rewards, gamma=method.discount, lam=method.gae_lambda, whitened=method.whiten_advantages
            )  # fmt: skip
        else:
            samples = with_returns(samples, keys, rewards, gamma=1.0)
        mean = {sample.id: fmean(sample.columns["advantage"]) for sample in samples}
        return samples, [with_credit(trace, lambda turn: mean.get(turn.id)) for trace in traces]

    def _rewards(self, sample: Sample, steps: Mapping[int, float] | None) -> NDArray[np.float64]:
        """The turn's reward on its last token, or a PRM's on the ends of the steps, each its share; minus the KL."""
        in_reward = self.method.kl.place == "reward" and self.reference is not None
        shares = {place: value / len(steps) for place, value in steps.items()} if steps else None
        outcome = sample.advantage - (min(steps.values()) if steps else 0.0)
        return token_rewards(
            np.ones(len(sample.completion_ids), dtype=bool), outcome=outcome, process=shares,
            kl_N=_kl_of(sample, self.method.kl.estimator) if in_reward else None,
            kl_coefficient=self.coefficient if in_reward else 0.0,
        )  # fmt: skip

    def _minibatches(self, step: int, samples: Sequence[Sample]) -> Iterator[Minibatch]:
        """Trees dealt out anew for each pass. Samples without any gradient are counted, and left out."""
        useful = self.reference is not None or (bool(samples) and "advantage" in samples[0].columns)
        trees = list(dict.fromkeys(sample.tree for sample in samples))
        for number in range(self.method.updates_per_batch):
            if self.method.minibatches > 1:
                Random(derive_seed(self.run.config.seed, "minibatches", step, number)).shuffle(trees)
            for part in range(self.method.minibatches):
                chosen = set(trees[part :: self.method.minibatches])
                members = [sample for sample in samples if sample.tree in chosen]
                yield Minibatch(samples=[s for s in members if useful or s.advantage], totals=Totals.of(members))

    # ---- learn

    def learn(self, step: int, minibatch: Minibatch) -> Mapping[str, float]:
        """One optimizer step of the policy, and one of the critic; during its warm-up, of the critic alone."""
        method, metrics = self.method, {}
        build = partial(policy_objective, method, kl_coefficient=self.coefficient, max_length=_max_length(self.run))
        if self.critic_learner:
            assert isinstance(method, PPOConfig)
            objective = build(policy=False, value=True)
            found = self.critic_learner.update(minibatch.samples, objective, minibatch.totals)
            metrics = {name if name.startswith("value/") else f"critic/{name}": value for name, value in found.items()}
            if step < method.critic_warmup_steps:
                return metrics
        shared = isinstance(method, PPOConfig) and method.critic == "shared"
        return metrics | self.learner.update(minibatch.samples, build(value=shared), minibatch.totals)

    def held_out(self) -> Mapping[str, float]:
        """Greedy accuracy of the team on held-out questions."""
        run = self.run
        tasks = run.test_tasks[: run.config.evaluation.num_tasks]
        how = how_to_play(run, Sampling(temperature=0.0), run.config.evaluation.seed)
        traces = play_all(run, tasks, how, label="held_out", keep=False, bar=False)
        return {"accuracy": fmean(trace.reward or 0.0 for trace in traces)}


def _replays(method: OnlineMethod, form: Literal["sibling", "weight"]) -> bool:
    """Whether credit by replays enters in this form."""
    return isinstance(method, GroupConfig) and method.credit.method != "local" and method.credit.form == form


def _sampling(run: Run, method: OnlineMethod) -> Sampling:
    if not isinstance(method, ATGRPOConfig):
        episodes = method.group_size if isinstance(method, GRPOConfig) else 1
        return Sampling(temperature=run.config.rollout.temperature, alpha=method.alpha, episodes=episodes)
    return Sampling(
        temperature=run.config.rollout.temperature, group_size=method.group_size, commit=method.commit, alpha=method.alpha,
        team_rollouts=method.team_rollouts,
    )  # fmt: skip


def _answer(run: Run, trace: Trace) -> Turn | None:
    """The last turn whose role gives an answer: its reward is the outcome of the episode."""
    answers = [turn for turn in trace.path if run.team.agents[turn.agent].role.produces == "answer"]
    return answers[-1] if answers else None


def _outcome(run: Run, trace: Trace) -> float | None:
    """The reward of the turn that gave the team's answer; of a vote, whether it was right. None where the turn failed."""
    answer = _answer(run, trace)
    if answer is None or answer.reward is None:
        return None
    return trace.reward if run.team.topology.votes else answer.reward


def trajectories(method: OnlineMethod, traces: Sequence[Trace], samples: Sequence[Sample]) -> list[Hashable]:
    """Of each sample: an agent's turns in one episode are one; a turn is one alone where each earns the whole outcome."""
    if isinstance(method, GRPOConfig) and method.group_by == "task":
        return [sample.id for sample in samples]
    agents = {turn.id: (number, turn.agent) for number, trace in enumerate(traces) for turn in trace.turns}
    return [agents[sample.id] for sample in samples]


def _by_token(method: OnlineMethod) -> bool:
    return isinstance(method, GroupConfig) and method.advantage == "reinforce_pp"


def _kl_of(sample: Sample, estimator: Literal["k1", "k2", "k3"]) -> NDArray[np.float64]:
    """Of each token, in nats, between the policy that sampled it and the reference."""
    sampled, reference = sample.behavior_logprobs, sample.columns["reference_logprob"]
    return np.asarray(kl_estimate(torch.tensor(sampled, dtype=torch.float64), torch.tensor(reference), estimator=estimator))


def _max_length(run: Run) -> int:
    """The longest completion that any agent may write: Dr. GRPO's constant."""
    task = run.train_tasks[0]
    return max(run.team.template.limit(task, agent) for agent in run.team.agents.values())

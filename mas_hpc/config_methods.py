"""The knobs of the methods, and what every section is made of: config.py holds all other sections. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A group of knobs with one owner."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Optimization(Section):
    """The optimizer, its schedule, and how often held-out data is looked at."""

    steps: Count
    """Optimizer steps, or batches of rollouts."""
    learning_rate: PositiveFloat
    """Peak learning rate."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adafactor keeps factored second moments and no first ones: almost no memory beside the weights."""
    beta1: Fraction = 0.9
    """AdamW first-moment decay."""
    beta2: Fraction = 0.95
    """AdamW second-moment decay."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay."""
    warmup_steps: Count = 5
    """Steps of linear warm-up."""
    decay_fraction: Fraction = 1.0
    """Share of the steps, at the end, over which the rate falls to min_ratio: 1 linear or cosine, 0 constant, between: WSD."""
    decay: Literal["linear", "cosine"] = "linear"
    """Form of the fall."""
    min_ratio: Fraction = 0.05
    """Last learning rate over the peak."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm limit, per policy."""
    max_skipped: Positive = 3
    """Steps in a row without a finite loss and gradient, which are skipped, after which weights and optimizer go back to the
    last checkpoint; without one, or when that has been tried, the run ends."""
    eval_every: Count = 0
    """Steps between looks at held-out data; the best weights seen are the ones that are kept. 0: never, keep the last."""


class OfflineConfig(Optimization):
    """Training on data that exists."""

    batch_size: Positive = 32
    """Examples a step: transcripts, documents, pairs or solutions."""
    wrong_rate: Fraction = 0.5
    """Share of answers that the demonstrator gets wrong at a random place, so that checking is learnt; not trained on."""
    slip_rate: Fraction = 0.0
    """Share of answers with the demonstrator's habitual slip; trained on: this is the habit that RL has to unlearn."""


class SFTConfig(OfflineConfig):
    """Supervised fine-tuning on documents, or on role transcripts that the project writes from a task set."""

    kind: Literal["sft"] = "sft"
    """Name of the variant."""
    steps: Count = 300
    learning_rate: PositiveFloat = 2e-3
    train_on: Literal["auto", "completion", "assistant", "all"] = "auto"
    """Tokens of documents: auto is completion where there is a prompt, assistant for messages, and all for text."""
    neftune_alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """Size of NEFTune's noise on the embeddings (arXiv 2310.05914); 0: none, 5 is usual."""


class RewardModelConfig(OfflineConfig):
    """A reward model: the model with one number read after the last token."""

    kind: Literal["rm"] = "rm"
    """Name of the variant."""
    steps: Count = 300
    learning_rate: PositiveFloat = 2e-3
    objective: Literal["bradley_terry", "outcome"] = "bradley_terry"
    """bradley_terry: the chosen answer above the rejected one; outcome (ORM): right or wrong, by cross-entropy."""
    center_coefficient: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight of (chosen + rejected)^2, which keeps Bradley-Terry rewards around 0."""


class ProcessRewardConfig(OfflineConfig):
    """A process reward model: one number read at the end of every step, right or wrong by cross-entropy."""

    kind: Literal["prm"] = "prm"
    """Name of the variant."""
    steps: Count = 300
    learning_rate: PositiveFloat = 2e-3


PreferenceLoss = Literal["sigmoid", "hinge", "ipo_sum", "ipo_mean", "robust", "simpo", "orpo", "kto", "sft"]


class DPOConfig(OfflineConfig):
    """Direct preference optimization and its relatives."""

    kind: Literal["dpo"] = "dpo"
    """Name of the variant."""
    steps: Count = 100
    learning_rate: PositiveFloat = 5e-4
    losses: dict[PreferenceLoss, float] = {"sigmoid": 1.0}
    """Weights of the losses that are added: sigmoid, hinge, ipo_sum, ipo_mean, robust, simpo, orpo, kto, sft."""
    beta: PositiveFloat = 0.1
    """Strength of the reference; for simpo the reward scale, 2 is usual."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of pairs taken to be the wrong way round (sigmoid: conservative DPO; robust)."""
    gamma: Annotated[float, Field(ge=0.0)] = 1.0
    """Target margin of simpo."""
    reference_free: bool = False
    """Take the reference's log-probabilities as equal, so that they cancel."""
    desirable_weight: PositiveFloat = 1.0
    """kto: weight of the desirable answers."""
    undesirable_weight: PositiveFloat = 1.0
    """kto: weight of the undesirable answers."""

    @model_validator(mode="after")
    def _losses_that_go_together(self) -> DPOConfig:
        if not self.losses or ("kto" in self.losses and len(self.losses) > 1):
            raise ValueError(f"losses={self.losses}: expected losses of pairs, or kto alone, which judges single answers")
        if "kto" in self.losses and self.reference_free:
            raise ValueError("reference_free=true: kto compares with the reference; set it to false")
        if "kto" in self.losses and self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size}: kto estimates its KL from other prompts; set it to 2 or more")
        if min(self.losses.values()) < 0 or not 0 < sum(self.losses.values()) < math.inf:
            raise ValueError(f"losses={self.losses}: expected finite weights of 0 or more, and one above 0")
        return self


class KLConfig(Section):
    """Distance to the reference: the policy as it was before this method, or the base model under adapters."""

    coefficient: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight; 0: no reference is kept."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of log pi - log pi_ref = d: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d."""
    place: Literal["loss", "reward"] = "loss"
    """loss: a term of the loss; reward: subtracted from each token's reward (PPO and reinforce_pp)."""
    unbiased: bool = True
    """In the loss, take the gradient of k2, which is the one of the KL; the value is the estimator's."""
    target: Annotated[float, Field(ge=0.0)] = 0.0
    """KL a sequence, in nats, that the coefficient is adapted to; 0: it stays fixed."""
    horizon: PositiveFloat = 10_000.0
    """Sequences over which an adapted coefficient moves by its error."""


class OnlineConfig(Optimization):
    """Training on completions that the team samples."""

    steps: Count = 100
    learning_rate: PositiveFloat = 4e-4
    tasks_per_step: Positive = 16
    """Questions a step."""
    updates_per_batch: Positive = 1
    """Passes over each batch of rollouts."""
    minibatches: Positive = 1
    """Optimizer steps a pass."""
    clip_low: PositiveFloat = 0.2
    """Clip of the ratio below 1."""
    clip_high: PositiveFloat = 0.2
    """Clip of the ratio above 1; 0.28 is DAPO's."""
    dual_clip: Annotated[float, Field(ge=0.0)] = 0.0
    """Bound on the ratio of bad actions, 3 is usual; 0: none."""
    alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the team reward beside the role's local reward."""
    break_penalty: Annotated[float, Field(ge=0.0)] = 0.0
    """An answer that breaks a right one earns minus this."""
    reward_model: str = ""
    """Folder of a trained reward model or PRM (runs/<name>/model) for the local reward of answers; empty: the verifier, which
    also judges verdicts, team rewards and accuracy."""
    overlong_buffer: Count = 0
    """Soft length penalty over the last tokens before the limit (DAPO, arXiv 2503.14476, eq. 13); 0: none."""
    truncated: Literal["keep", "mask", "penalize"] = "keep"
    """Completions that hit the limit: trained on as they are, left out, or their reward lowered by 1."""
    mismatch: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Importance weights of the trainer's policy over the engine's; none: the engine's log-probabilities are the old ones."""
    mismatch_cap: PositiveFloat = 2.0
    """Largest such weight; larger ones are cut to it or masked."""
    kl: KLConfig = KLConfig()

    @model_validator(mode="after")
    def _ratio_and_kl(self) -> OnlineConfig:
        if 0 < self.dual_clip <= 1:
            raise ValueError(
                f"dual_clip={self.dual_clip:g}: it bounds ratios above 1; set it above 1 (3 is usual), or 0 for none"
            )
        if self.kl.coefficient and self.kl.place == "loss" and self.kl.estimator == "k1" and not self.kl.unbiased:
            raise ValueError(
                "kl.estimator=k1 in the loss has a gradient that ignores the reference; set kl.unbiased=true, or k2 or k3"
            )
        if self.kl.target and not self.kl.coefficient:
            raise ValueError(f"kl.target={self.kl.target:g} needs a kl.coefficient above 0 to start from, such as 0.05")
        return self


class PPOConfig(OnlineConfig):
    """PPO with a critic (arXiv 1707.06347, 1909.08593)."""

    kind: Literal["ppo"] = "ppo"
    """Name of the variant."""
    discount: Fraction = 1.0
    """Gamma of the returns."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalized advantage estimation (arXiv 1506.02438); tokens of others are skipped."""
    critic: Literal["shared", "separate"] = "separate"
    """separate: a copy of the model with a value head; shared: a value head on the policy itself."""
    critic_learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of a separate critic."""
    critic_warmup_steps: Count = 0
    """First steps in which only a separate critic learns."""
    value_coefficient: PositiveFloat = 0.1
    """Weight of a shared critic's loss."""
    value_clip: Annotated[float, Field(ge=0.0)] = 0.2
    """Clip of the value's change; 0: none."""
    whiten_advantages: bool = True
    """Mean 0 and standard deviation 1 over all tokens of the batch."""

    @model_validator(mode="after")
    def _critic_of_its_own(self) -> PPOConfig:
        if self.critic == "shared" and self.critic_warmup_steps:
            raise ValueError(
                f"critic_warmup_steps={self.critic_warmup_steps}: steps of a shared critic move the policy too; "
                "set critic_warmup_steps=0, or critic=separate"
            )
        return self


class CreditConfig(Section):
    """What a turn earns, found by replays, in place of its role's own reward (a PRM's scores: method.reward_model)."""

    method: Literal["local", "outcome", "loo", "shapley", "first_error", "reward_blame"] = "local"
    """local: the role's verifiable reward, and no replays; the others as in `mas-hpc credit`."""
    value: Literal["removal", "replacement", "masked", "resample"] = "resample"
    """What a coalition of agents is worth: the others skipped, replaced by the base, masked from the record, or resampled."""
    replays: Positive = 1
    """Replays that each value is the mean of."""
    form: Literal["sibling", "weight"] = "sibling"
    """sibling: each turn earns the credit of its own path; weight: advantages are multiplied by the size of the credit."""
    weight_limit: Annotated[float, Field(ge=1.0)] = 3.0
    """weight: largest factor, and 1 over the smallest."""

    @model_validator(mode="after")
    def _acts(self) -> CreditConfig:
        others = self.model_copy(update={"method": "local"})
        if self.method == "local" and others != CreditConfig.model_construct():
            raise ValueError("method=local: without replays value, replays, form and weight_limit do nothing; leave them out")
        anew = self.value in ("removal", "replacement") and self.method in ("loo", "shapley", "reward_blame")
        if self.form == "sibling" and anew:
            raise ValueError(
                f"value={self.value}: a coalition plays anew from the question, so that siblings of one state earn the same "
                "and centring erases it; set value to masked or resample, or form=weight"
            )
        if self.form == "weight" and self.method == "outcome":
            raise ValueError("form=weight: the outcome is the same for all agents; set method, such as shapley")
        return self


class GroupConfig(OnlineConfig):
    """Advantages from groups of completions instead of a critic."""

    group_size: Positive = 8
    """Completions in a group; K siblings of every state in at_grpo."""
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "dapo"
    """grpo: mean over sequences of token means; dapo: mean over tokens; dr_grpo: sum over a constant length; gspo: ratio of
    whole sequences; cispo: clipped ratio as a weight of log pi, relative to 1."""
    advantage: Literal["group", "group_mean", "group_batch", "rloo", "reinforce_pp", "rae"] = "group"
    """group: minus the mean, over the standard deviation; group_mean: minus the mean (Dr. GRPO); group_batch: over that of the
    batch; rloo: minus the mean of the others; reinforce_pp: whitened over all tokens; rae: minus the agent's moving average."""

    credit: CreditConfig = CreditConfig()

    @model_validator(mode="after")
    def _credit_of_a_turn(self) -> GroupConfig:
        if self.credit.form == "weight" and self.advantage == "reinforce_pp":
            raise ValueError(
                "credit.form=weight multiplies advantages, and advantage=reinforce_pp whitens later; choose another"
            )
        if self.credit.method != "local" and self.credit.form == "sibling" and self.reward_model:
            raise ValueError(f"credit.method={self.credit.method} and reward_model would both set a turn's reward; keep one")
        return self

    @model_validator(mode="after")
    def _combinations(self) -> GroupConfig:
        grouped = self.advantage not in ("reinforce_pp", "rae")
        if grouped and self.group_size < 2:
            raise ValueError(
                f"group_size={self.group_size}: advantage={self.advantage} compares members of a group; set it to 2 or more"
            )
        if self.dual_clip and self.loss in ("gspo", "cispo"):
            raise ValueError(f"dual_clip={self.dual_clip:g} has no meaning with loss={self.loss}; set dual_clip=0")
        if self.loss == "gspo" and self.advantage == "reinforce_pp":
            raise ValueError("loss=gspo has one ratio a sequence, advantage=reinforce_pp one value a token; set loss=dapo")
        if self.kl.coefficient and self.kl.place == "reward" and self.advantage != "reinforce_pp":
            raise ValueError(f"kl.place=reward needs advantages a token, not advantage={self.advantage}; set kl.place=loss")
        return self


class GRPOConfig(GroupConfig):
    """GRPO (arXiv 2402.03300) and its relatives: whole episodes are sampled group_size times."""

    kind: Literal["grpo"] = "grpo"
    """Name of the variant."""
    group_by: Literal["task", "agent"] = "task"
    """What a turn is compared with. task: all episodes of the question, by outcome; agent: the agent's turns, by its reward."""
    dynamic_sampling: Count = 0
    """Further rounds of sampling that replace groups without variance (DAPO); 0: none."""
    rae_decay: Fraction = 0.95
    """Of the moving average of advantage rae."""

    @model_validator(mode="after")
    def _turns_are_compared(self) -> GRPOConfig:
        if self.credit.method != "local" and self.credit.form == "sibling" and self.group_by == "task":
            raise ValueError(
                f"credit.method={self.credit.method}: with group_by=task every turn earns the outcome; set group_by=agent, or "
                "credit.form=weight"
            )
        return self

    @model_validator(mode="after")
    def _variance_to_look_for(self) -> GRPOConfig:
        if self.dynamic_sampling and self.group_size < 2:
            raise ValueError(
                f"dynamic_sampling={self.dynamic_sampling}: a group of one never has variance; set group_size to 2 or more"
            )
        return self


class ATGRPOConfig(GroupConfig):
    """Agent- and turn-wise GRPO with tree sampling (arXiv 2510.11062, section 4.1)."""

    kind: Literal["at_grpo"] = "at_grpo"
    """Name of the variant."""
    commit: Literal["sampled", "best"] = "sampled"
    """Which sibling the episode continues from; best starves later roles of wrong states."""
    team_rollouts: Count = 0
    """Continuations that value a sibling's team reward; 0: the shared outcome, which group centring erases."""
    agent_weights: dict[str, float] = {}
    """Factor on an agent's advantages, by agent name; 1 where absent."""
    balance_verdicts: Annotated[float, Field(ge=0.0)] = 3.0
    """Largest weight of a rare truth class on verdict advantages (0.5 / class share, at most this); 0: no balancing."""
    break_penalty: Annotated[float, Field(ge=0.0)] = 0.5
    group_size: Annotated[int, Field(ge=2)] = 8

    @model_validator(mode="after")
    def _state_groups(self) -> ATGRPOConfig:
        if self.commit == "best" and self.credit.method != "local" and self.credit.form == "sibling":
            raise ValueError(
                "commit=best: the committed sibling would earn the credit of a best-of-K path, the others of a sampled one; "
                "set commit=sampled, or credit.form=weight"
            )
        if self.advantage in ("reinforce_pp", "rae"):
            raise ValueError(f"advantage={self.advantage} has no groups; at_grpo compares siblings of one state. Use kind=grpo")
        return self


OfflineMethod = SFTConfig | RewardModelConfig | ProcessRewardConfig | DPOConfig
OnlineMethod = PPOConfig | GRPOConfig | ATGRPOConfig
MethodConfig = Annotated[OfflineMethod | OnlineMethod, Field(discriminator="kind")]

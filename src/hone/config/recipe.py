"""The configuration tree of a run: every field with its meaning, its default and the rules that it must keep."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
PortPair = Annotated[int, Field(ge=1, le=65534)]


BUILT_IN_TEMPLATES = ("chatml", "qwen3", "glm4", "llama3")


class Section(BaseModel):
    """A part of the tree: frozen, unknown fields refused, the sentence under a field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _complete_sections(cls, given: Any) -> Any:
        """A section given in part keeps the rest of its parent's default: [rl.optimizer] without lr has rl's lr."""
        if not isinstance(given, dict):
            return given
        defaults = {name: f.default for name, f in cls.model_fields.items() if isinstance(f.default, Section)}
        return given | {
            name: default.model_dump(exclude_unset=True) | given[name]
            for name, default in defaults.items()
            if isinstance(given.get(name), dict)
        }


class ModelSection(Section):
    """The base model: loaded from a folder, or built with random weights from a Hugging Face style config."""

    path: str | None = None
    """Folder in the Hugging Face layout, or the name of a model on the Hugging Face hub."""
    config: dict[str, Any] | None = None
    """Fields of a Hugging Face config.json (model_type, hidden_size, ...) to build a model with random weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the weights in trainer and engine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where model and optimizer live; auto takes a GPU where there is one."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError(
                "give either model.path (a trained model) or model.config (build one), not both and not neither"
            )
        return self


class TokenizerSection(Section):
    """The tokenizer and chat template; by default those in the model's folder."""

    path: str | None = None
    """Folder with tokenizer.json; default: the model's folder, or one is trained when vocab_size is given."""
    vocab_size: Positive | None = None
    """Train a byte-level BPE of this size on the environments' prompts and references."""
    alphabet: Literal["bytes", "seen"] = "bytes"
    """Start a trained tokenizer from all 256 bytes, or only from those seen in the training text."""
    chat_template: str | None = None
    """A template that ships with hone (chatml, qwen3, glm4, llama3) or, for a trained tokenizer that is loaded, the path of a Jinja2 file; default: the model's."""

    @model_validator(mode="after")
    def _no_dead_fields(self) -> Self:
        if self.vocab_size is not None and self.path is not None:
            raise ValueError("tokenizer.vocab_size trains a tokenizer, tokenizer.path loads one; give one of them")
        if self.vocab_size is None and self.alphabet == "seen":
            raise ValueError("tokenizer.alphabet has no effect without tokenizer.vocab_size, which trains a tokenizer")
        if self.vocab_size is not None and self.chat_template not in BUILT_IN_TEMPLATES:
            raise ValueError(
                f"tokenizer.chat_template is {self.chat_template!r}; a tokenizer that is trained takes its special tokens"
                f" from one of {', '.join(BUILT_IN_TEMPLATES)}"
            )
        return self


class PoolsSection(Section):
    """Pools of an environment's tasks by solve rate: the share of solved rollouts in the latest group of a task. Tasks without a group are normal."""

    easy_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the environment's turns that take an easy task; with none there, a normal one."""
    hard_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the turns that take a hard task; the rest is for normal ones."""
    easy_from: Fraction = 0.75
    """Solve rate from which a task is easy."""
    hard_to: Fraction = 0.25
    """Solve rate up to which a task is hard."""
    retire_after: Positive | None = None
    """A task whose rollouts were all solved in so many groups in a row is not drawn any more, while there are others; default: never."""

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if self.hard_to >= self.easy_from:
            raise ValueError(
                f"pools.hard_to {self.hard_to} is not below pools.easy_from {self.easy_from}: a task would be both"
            )
        if self.easy_share + self.hard_share >= 1:
            raise ValueError(
                f"pools.easy_share {self.easy_share} and pools.hard_share {self.hard_share} leave no turn for normal"
                " tasks, and unseen ones are normal; lower them"
            )
        return self


class CurriculumSection(Section):
    """A curriculum on the difficulty that an environment declares: easy tasks first, harder ones as the solve rate rises."""

    start_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the tasks, the easiest, that is open at the beginning."""
    step_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the tasks that each further level opens."""
    advance_at: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Mean solve rate of the latest groups that opens the next level."""
    window: Positive = 32
    """How many groups that are, all of them since the level before was opened."""


class EnvironmentSection(Section):
    """One environment of the mixture."""

    name: str
    """Entry point name of an installed environment package."""
    weight: PositiveFloat = 1.0
    """Share of the mixture, relative to the other environments."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the package's load_environment."""
    python: str | None = None
    """Virtual environment (its folder) or Python in which the package is installed, with hone; default: that of hone itself. Env workers of its own run there."""
    solved_reward: float | None = None
    """Reward from which pools and the curriculum take a rollout for solved (1)."""
    pools: PoolsSection | None = None
    curriculum: CurriculumSection | None = None

    @model_validator(mode="after")
    def _no_dead_fields(self) -> Self:
        if self.solved_reward is not None and self.pools is None and self.curriculum is None:
            raise ValueError(
                "environments.solved_reward has no effect without environments.pools or environments.curriculum; remove it"
            )
        return self

    @property
    def reward_of_solved(self) -> float:
        """The reward from which a rollout counts as solved."""
        return 1.0 if self.solved_reward is None else self.solved_reward


class SamplingSection(Section):
    """How rollouts are sampled."""

    temperature: NonNegativeFloat = 1.0
    """Softmax temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; 1 is off."""
    top_k: NonNegative = 0
    """Sample among the k likeliest tokens; 0 is off."""
    min_p: Fraction = 0.0
    """Drop tokens less likely than this share of the likeliest; 0 is off."""
    max_tokens: Positive = 256
    """Longest completion of one turn, in tokens."""


class OptimizerSection(Section):
    """The optimizer and its schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for matrices with AdamW for the rest (embeddings, output layer, vectors)."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices."""
    momentum: DecayRate | None = None
    """Muon's momentum (0.95); only with kind = muon."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up."""
    min_lr_ratio: Fraction | None = None
    """Where linear and cosine schedules end, as a share of lr (0); only with these."""

    @model_validator(mode="after")
    def _no_dead_fields(self) -> Self:
        if self.kind != "muon" and self.momentum is not None:
            raise ValueError("optimizer.momentum has no effect with kind = 'adamw'; remove it or use kind = 'muon'")
        if self.schedule == "constant" and self.min_lr_ratio is not None:
            raise ValueError(
                "optimizer.min_lr_ratio has no effect with a constant schedule; remove it or choose linear or cosine"
            )
        return self


class TrainerSection(Section):
    """How the trainer runs, for SFT and RL alike."""

    num_ranks: Positive = 1
    """Trainer processes (torchrun ranks); weights are sharded over them with FSDP2."""
    micro_batch_tokens: Positive = 16384
    """Most tokens that a rank forwards at once; a step's samples are packed into as many micro-batches as needed."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a quarter more time."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Compute in bfloat16 with float32 master weights."""
    numerics: Literal["fast", "strict"] = "fast"
    """fast: trainer and engine agree up to rounding; GPU, bfloat16 and torch's kernels are taken where they are there. strict: equal bit for bit, however tokens are batched, cut and packed; always on the CPU, and what cannot keep that (another number type, no C compiler) is refused at the start."""
    checkpoint_every: Positive = 50
    """Optimizer steps between two resumable checkpoints."""
    keep_checkpoints: Positive = 2
    """How many checkpoints stay on disk."""
    max_bad_steps: Positive = 5
    """Steps with a non-finite loss or gradient that may be skipped before the run stops."""
    threads: Positive | None = None
    """CPU threads of all trainer ranks together; default: half of the cores during RL, where an engine has the others, else all."""


class SftSection(Section):
    """Supervised fine-tuning."""

    data: str = "environments"
    """JSONL or parquet file with a `messages` column, a Hugging Face data set name, or `environments` for their gold answers."""
    num_conversations: Positive | None = None
    """Use this many conversations; default: all (with data = environments it must be given)."""
    max_length: Positive = 2048
    """Longer conversations are dropped and counted."""
    batch_tokens: Positive = 16384
    """Tokens of one optimizer step, over all ranks."""
    epochs: PositiveFloat = 1.0
    """Passes over the data."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps; default: when the epochs are over."""
    validation_conversations: NonNegative = 0
    """The last so many conversations are not trained; their loss and likelihood are measured."""
    validate_every: Positive | None = None
    """Optimizer steps between two measurements (10); only with validation_conversations."""
    stop_at_likelihood: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Stop when an answer of the validation conversations is sampled word for word with this mean probability."""
    optimizer: OptimizerSection = OptimizerSection()

    @model_validator(mode="after")
    def _counted(self) -> Self:
        if self.max_steps is not None:
            check_warmup("sft", self.optimizer, self.max_steps, "max_steps")
        if self.data == "environments" and self.num_conversations is None:
            raise ValueError(
                "sft.data = 'environments' needs sft.num_conversations: environments may have endless tasks"
            )
        if not self.validation_conversations and (self.validate_every or self.stop_at_likelihood):
            raise ValueError("sft.validate_every and sft.stop_at_likelihood need sft.validation_conversations")
        if self.num_conversations is not None and self.validation_conversations >= self.num_conversations:
            raise ValueError(
                f"sft.validation_conversations {self.validation_conversations} leaves nothing to train"
                f" of sft.num_conversations {self.num_conversations}"
            )
        return self


class LossSection(Section):
    """The policy loss, composed of a surrogate with its mask, a reducer and penalties (docs/concepts, losses)."""

    kind: Literal["icepop", "dppo_tv", "ppo_clip", "gspo", "cispo", "aipo"] = "icepop"
    """icepop: INTELLECT-3's double-sided masking; dppo_tv: mask by difference of probabilities; ppo_clip; gspo: sequence ratios; cispo, aipo: clipped, detached ratios (the same formula, since both are anchored on the sampler)."""
    low: NonNegativeFloat | None = None
    """Lower bound: icepop's ratio (0.5), dppo_tv's difference of probabilities (0.2), ppo_clip's and gspo's 1 - low (0.2, 3e-4; at most 1)."""
    high: PositiveFloat | None = None
    """Upper bound: icepop's ratio (5), dppo_tv's difference (0.2), clip's and gspo's 1 + high (0.2, 4e-4), cispo's and aipo's cap (5)."""
    sequence_mask_below: NonNegativeFloat = 1e-5
    """A sequence with any token ratio under this is left out whole; 0 is off."""
    reducer: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """token_mean: over all tokens of the step; sequence_mean: mean of each sequence's mean; sequence_sum: mean of sums; constant: sums over samples x max_tokens (Dr. GRPO). gspo has sequence_mean, and nothing else."""
    kl_tau: NonNegativeFloat = 0.0
    """Weight of the squared log ratio between trainer and sampler; keeps the policy near the one that sampled."""
    reference_kl: NonNegativeFloat = 0.0
    """Weight of the KL divergence to the reference policy (the weights that RL started from); 0 loads no reference."""

    @model_validator(mode="before")
    @classmethod
    def _reducer_of_the_kind(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("kind") == "gspo":
            return {"reducer": "sequence_mean"} | given
        return given

    @model_validator(mode="after")
    def _no_dead_fields(self) -> Self:
        if self.kind == "gspo" and self.reducer != "sequence_mean":
            raise ValueError(
                f"rl.loss.reducer = {self.reducer!r} does not fit kind = 'gspo', whose ratio is a sequence's; remove it"
            )
        if self.kind in ("ppo_clip", "gspo") and self.low is not None and self.low > 1:
            raise ValueError(f"rl.loss.low {self.low} is above 1: ratios would be clipped at 1 - low, below zero")
        if self.kind in ("cispo", "aipo") and self.low is not None:
            raise ValueError(
                f"rl.loss.low has no effect with kind = {self.kind!r}, which clips from above only; remove it"
            )
        if self.kind == "icepop" and self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(
                f"rl.loss.low {self.low} is not below rl.loss.high {self.high}: every token would be masked"
            )
        return self


class RlSection(Section):
    """Asynchronous reinforcement learning."""

    num_steps: Positive = 100
    """Optimizer steps."""
    batch_size: Positive = 128
    """Rollouts of one optimizer step."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Rollouts of one task that are compared with one another."""
    max_staleness: NonNegative = 4
    """No sample older than this many policy versions is trained; 0 alternates generation and training."""
    in_flight_updates: bool = True
    """Unfinished rollouts go on under new weights; off: an update waits until the running rollouts are finished."""
    max_concurrent: Positive | None = None
    """Most rollouts under way; default: as many as the staleness bound admits."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "max_rl"] = "dr_grpo"
    """grpo: (r - mean) / std; dr_grpo: r - mean; rloo: r - mean of the others; max_rl: (r - mean) / mean."""
    batch_normalisation: bool = False
    """Divide the advantages of a step by their standard deviation over the step."""
    filter_without_signal: bool = True
    """Leave out groups whose rewards are all equal, and fill their places."""
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection(lr=1e-6)
    sampling: SamplingSection = SamplingSection()
    max_turns: Positive | None = None
    """Truncate rollouts after this many turns; default: the environment's own limit."""
    max_tool_calls: NonNegative | None = None
    """Truncate rollouts that want more tool calls than this; default: the environment's own limit."""
    rollout_timeout_seconds: PositiveFloat = 600.0
    """A rollout that takes longer is a failure of class timeout."""
    stop_at_reward: float | None = None
    """End early when the evaluation during training reaches this mean reward."""

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        check_warmup("rl", self.optimizer, self.num_steps, "num_steps")
        if self.batch_size % self.group_size:
            raise ValueError(
                f"rl.group_size {self.group_size} does not divide rl.batch_size {self.batch_size};"
                f" use {nearest_divisors(self.batch_size, self.group_size)}"
            )
        if self.sampling.temperature == 0:
            raise ValueError(
                "rl.sampling.temperature is 0: all rollouts of a group would be equal; use a positive temperature"
            )
        for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            if getattr(self.sampling, name) != off:
                raise ValueError(
                    f"rl.sampling.{name} cuts the distribution that the loss assumes: the importance ratios would be wrong; remove it"
                )
        if self.max_concurrent is not None and self.max_concurrent < self.group_size:
            raise ValueError(f"rl.max_concurrent {self.max_concurrent} is less than one group of {self.group_size}")
        return self

    @property
    def groups_per_batch(self) -> int:
        return self.batch_size // self.group_size


def check_warmup(section: str, optimizer: OptimizerSection, num_steps: int, field: str) -> None:
    """Refuse a warm-up that lasts to the end: the learning rate of the recipe would never be reached."""
    if optimizer.warmup_steps >= num_steps:
        raise ValueError(
            f"{section}.optimizer.warmup_steps {optimizer.warmup_steps} leaves none of {section}.{field} {num_steps};"
            " lower it"
        )


def nearest_divisors(total: int, wish: int) -> str:
    """The divisors of `total` on both sides of `wish`, for an error message."""
    divisors = [n for n in range(2, total + 1) if total % n == 0]
    below = [n for n in divisors if n < wish][-1:]
    above = [n for n in divisors if n > wish][:1]
    return " or ".join(str(n) for n in below + above)


class EngineSection(Section):
    """The inference engine."""

    block_size: Positive = 16
    """Tokens of one KV block."""
    num_blocks: Positive | None = None
    """KV blocks; default: what cache_bytes holds."""
    cache_bytes: Positive = 256 * 2**20
    """Memory of the KV cache; only without num_blocks."""
    max_running: Positive = 512
    """Most requests that decode at once."""
    max_batch_tokens: Positive = 4096
    """Most tokens of one engine step; longer prompts are prefilled in chunks."""
    max_context: Positive | None = None
    """Longest prompt plus completion; default: the model's. In RL never above trainer.micro_batch_tokens."""
    prefix_cache: bool = True
    """Reuse KV blocks of equal prefixes computed under the same weights."""
    dtype: Literal["model", "bfloat16"] = "model"
    """Number type of the engine: the model's, or bfloat16 for speed at the price of mismatch."""
    threads: Positive | None = None
    """CPU threads of the engine; default: half of the cores during RL, where a trainer has the others, else all."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        # A saved recipe has every field: what equals the default was not asked for.
        default = type(self).model_fields["cache_bytes"].default
        if self.num_blocks is not None and self.cache_bytes != default:
            raise ValueError("engine.cache_bytes has no effect with engine.num_blocks; give one of them")
        return self


class ServerSection(Section):
    """Addresses of the inference server."""

    host: str = "127.0.0.1"
    """Address that the OpenAI API binds to; 0.0.0.0 is every interface. Local processes keep to this machine's own address then."""
    port: Port = 0
    """Port of the OpenAI API; 0 takes a free one (hone serve: 8000)."""
    admin_host: str | None = None
    """Address of the admin routes when they shall not share the API's."""
    admin_port: Port | None = None
    """Port of the admin routes when they shall not share the API's; 0 takes a free one."""
    admin_token_variable: str | None = None
    """Environment variable that holds the bearer token of the admin routes."""

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if self.admin_host is not None and self.admin_port is None:
            raise ValueError("server.admin_host has no effect without server.admin_port; give both or neither")
        return self


class EvaluationSection(Section):
    """Evaluations: before, during and after training, through the same rollouts as training."""

    num_tasks: Positive = 128
    """Tasks of each environment, from its held-out split."""
    num_attempts: Positive = 1
    """Rollouts of each task (the k of avg@k and pass@k)."""
    every: Positive | None = None
    """Policy versions between two evaluations during RL; default: none during training."""
    sampling: SamplingSection = SamplingSection()
    max_concurrent: Positive = 256
    """Most evaluation rollouts under way."""


class RetriesSection(Section):
    """How often a rollout is attempted again after a failure, by its class; what is exhausted stays a recorded failure."""

    model: NonNegative = 2
    """After the engine or endpoint did not answer."""
    tool: NonNegative = 2
    """After a tool failed that the environment cannot do without."""
    sandbox: NonNegative = 2
    """After a sandbox failed."""
    judge: NonNegative = 2
    """After a judge failed."""
    harness: NonNegative = 2
    """After an outside agent program failed."""
    environment: NonNegative = 0
    """After the environment's own code raised or returned what is no reward."""
    timeout: NonNegative = 0
    """After a deadline passed."""
    worker: NonNegative = 10
    """After the process that ran the rollout died."""


class WorkersSection(Section):
    """The processes that run environments."""

    num_workers: NonNegative = 1
    """Env worker processes, so many for each Python that environments name; 0 runs the environments inside the orchestrator."""
    heartbeat_seconds: PositiveFloat = 1.0
    """A worker reports this often; after ten silent periods, and never before max_stall_seconds is over, it is taken for dead and its rollouts are issued again."""
    max_stall_seconds: PositiveFloat = 30.0
    """Environment code that keeps the event loop of its worker for longer is interrupted; its rollout is a failure of class timeout, the others go on."""
    max_rollouts_per_worker: Positive = 1024
    """Most rollouts under way in one env worker; others wait in the orchestrator for the least loaded one."""


class RunSection(Section):
    """The run itself."""

    name: str = "run"
    """Name of the run's folder."""
    folder: Path = Path("runs")
    """Where the folders of runs are."""
    seed: NonNegative = 0
    """Every random choice of the run is derived from this number."""
    max_restarts: NonNegative = 20
    """How often processes that died are started again, without ten minutes of peace in between, before the run is given up."""
    metrics_port: PortPair | None = None
    """Port of the trainer's Prometheus endpoint; the orchestrator's is the next one, the inference server's is /metrics at its admin address. Default: no endpoint for the two."""


class Recipe(Section):
    """The whole tree. Each fact is stated once; every process receives the tree and reads its part."""

    run: RunSection = RunSection()
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    environments: tuple[EnvironmentSection, ...] = ()
    sft: SftSection | None = None
    rl: RlSection | None = None
    trainer: TrainerSection = TrainerSection()
    engine: EngineSection = EngineSection()
    server: ServerSection = ServerSection()
    evaluation: EvaluationSection = EvaluationSection()
    workers: WorkersSection = WorkersSection()
    retries: RetriesSection = RetriesSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needs_environments = self.rl is not None or (self.sft is not None and self.sft.data == "environments")
        if needs_environments and not self.environments:
            raise ValueError("no [[environments]] given: rl and sft.data = 'environments' need at least one")
        elsewhere = [environment.name for environment in self.environments if environment.python is not None]
        if elsewhere and self.workers.num_workers == 0:
            raise ValueError(
                f"environment {elsewhere[0]!r} has a Python of its own, so its rollouts need env workers;"
                " set workers.num_workers to 1 or more"
            )
        names = [environment.name for environment in self.environments]
        if len(set(names)) != len(names):
            raise ValueError(
                f"environment {max(names, key=names.count)!r} is listed twice; merge the two or rename one package"
            )
        if self.model.config is not None and self.tokenizer.path is None and self.tokenizer.vocab_size is None:
            raise ValueError("a model built from model.config needs tokenizer.path or tokenizer.vocab_size")
        if self.tokenizer.vocab_size is not None and (self.model.config is None or not self.environments):
            raise ValueError(
                "tokenizer.vocab_size trains a tokenizer for model.config on the texts of [[environments]]"
            )
        if self.trainer.numerics == "strict" and self.model.device == "cuda":
            raise ValueError("trainer.numerics = 'strict' is for the CPU; set model.device to 'cpu' or leave it out")
        if self.trainer.numerics == "strict" and (
            self.model.dtype != "float32" or self.engine.dtype != "model" or self.trainer.autocast != "none"
        ):
            raise ValueError(
                "trainer.numerics = 'strict' needs float32 everywhere: model.dtype, engine.dtype = 'model', trainer.autocast = 'none'"
            )
        for section in self.environments:
            if self.rl is None and (section.pools is not None or section.curriculum is not None):
                raise ValueError(
                    f"environments.pools and environments.curriculum of {section.name!r} have no effect without [rl],"
                    " which draws tasks; remove them"
                )
        if self.rl is None and self.evaluation.every is not None:
            raise ValueError(
                "evaluation.every has no effect without [rl]: it counts the policy versions of RL; remove it"
            )
        if self.rl is not None and self.rl.stop_at_reward is not None and self.evaluation.every is None:
            raise ValueError(
                "rl.stop_at_reward needs evaluation.every: it is compared with the evaluations during training"
            )
        return self

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]:
        """Where trainer and engine compute: model.device, and the CPU in strict mode."""
        return "cpu" if self.trainer.numerics == "strict" else self.model.device

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.folder / self.run.name

"""The configuration tree of an evaluation of many models on many environments."""

import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from hone.config.recipe import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    SamplingSection,
    Section,
)

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class EvaluationRunSection(Section):
    """The evaluation itself."""

    name: str = "evaluation"
    """Name of the evaluation's folder."""
    folder: Path = Path("evals")
    """Where the folders of evaluations are."""
    seed: NonNegative = 0
    """The seed of every sampled turn is derived from this number."""


class AskedSection(Section):
    """What is asked, unless an environment says otherwise."""

    num_tasks: Positive = 128
    """Tasks of each environment, from its held-out split."""
    num_attempts: Positive = 1
    """Rollouts of each task (the k of avg@k, pass@k and pass^k)."""
    sampling: SamplingSection = SamplingSection()
    max_concurrent: Positive = 256
    """Most rollouts of one model under way."""
    max_failed_share: Fraction = 0.05
    """An environment of which a larger share of rollouts failed has no finished result."""


class SamplingOverrides(Section):
    """How this environment is sampled where it differs; what is left out is as for the others."""

    temperature: NonNegativeFloat | None = None
    """Softmax temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus sampling; 1 is off."""
    top_k: NonNegative | None = None
    """Sample among the k likeliest tokens; 0 is off."""
    min_p: Fraction | None = None
    """Drop tokens less likely than this share of the likeliest; 0 is off."""
    max_tokens: Positive | None = None
    """Longest completion of one turn, in tokens."""


class LimitsSection(Section):
    """Budgets, which truncate a rollout that is scored all the same, and the deadline, which fails it."""

    max_turns: Positive | None = None
    """Truncate after this many turns; default: the environment's own limit."""
    max_tool_calls: Positive | None = None
    """Truncate when more tools than this were called; default: the environment's own limit."""
    max_tokens: Positive | None = None
    """Truncate after this many sampled tokens over all turns; default: no limit."""
    budget_seconds: PositiveFloat | None = None
    """Truncate after this long: no further turn begins; default: no limit."""
    deadline_seconds: PositiveFloat = 600.0
    """A rollout that takes longer is a failure of class timeout; retries of an endpoint end with it."""


class EvaluatedEnvironment(Section):
    """One environment to evaluate on."""

    name: str
    """Entry point name of an installed environment package."""
    label: str | None = None
    """Its name in folders and tables, where one environment is listed with several arguments; default: name."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the package's load_environment."""
    python: str | None = None
    """Virtual environment (its folder) or Python in which the package is installed, with hone; default: that of hone itself. Its rollouts run there."""
    num_tasks: Positive | None = None
    """Tasks, from its held-out split; default: evaluation.num_tasks."""
    num_attempts: Positive | None = None
    """Rollouts of each task; default: evaluation.num_attempts."""
    sampling: SamplingOverrides = SamplingOverrides()
    limits: LimitsSection = LimitsSection()

    @property
    def shown(self) -> str:
        """The name in folders and tables."""
        return self.label or self.name


class PricesSection(Section):
    """What a million tokens cost."""

    prompt: NonNegativeFloat
    """Of the prompt."""
    completion: NonNegativeFloat
    """Of the completion, reasoning included."""
    cached: NonNegativeFloat | None = None
    """Of the prompt where the endpoint had it cached; default: as the rest of the prompt."""


class EvaluatedModel(Section):
    """One model to evaluate: a recipe's, a folder's, or one behind an address."""

    name: str
    """Its name in folders and tables."""
    recipe: Path | None = None
    """TOML file of a run: its newest policy, served with the recipe's engine for as long as the evaluation lasts."""
    path: Path | None = None
    """Folder in the Hugging Face layout, served for as long as the evaluation lasts."""
    address: str | None = None
    """Base address of an OpenAI-compatible API, for example http://127.0.0.1:8000/v1."""
    model: str | None = None
    """Model name at the address; default: name."""
    api_key_variable: str | None = None
    """Environment variable that holds the API key of the address; default: no key."""
    prices: PricesSection | None = None
    max_concurrent: Positive | None = None
    """Most rollouts under way; default: evaluation.max_concurrent."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("recipe", "path", "address") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"model {self.name!r} has {' and '.join(given) or 'neither recipe, path nor address'}; give one of"
                " recipe (a run's newest policy), path (a model folder) and address (an OpenAI-compatible API)"
            )
        for name in ("model", "api_key_variable"):
            if self.address is None and getattr(self, name) is not None:
                raise ValueError(f"model {self.name!r}: {name} has no effect without address; remove it")
        if self.address is not None and not self.address.startswith(("http://", "https://")):
            raise ValueError(f"model {self.name!r}: address {self.address!r} begins with neither http:// nor https://")
        return self


class EvaluationFile(Section):
    """The whole tree: every model is run on every environment."""

    run: EvaluationRunSection = EvaluationRunSection()
    evaluation: AskedSection = AskedSection()
    environments: Annotated[tuple[EvaluatedEnvironment, ...], Field(min_length=1)]
    models: Annotated[tuple[EvaluatedModel, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _named_apart(self) -> Self:
        shown = [environment.shown for environment in self.environments]
        named = [model.name for model in self.models]
        for what, names, remedy in (("environment", shown, "give one a label"), ("model", named, "rename one")):
            if len(set(names)) != len(names):
                raise ValueError(f"{what} {max(names, key=names.count)!r} is listed twice; {remedy}")
            for name in names:
                if LABEL.fullmatch(name) is None:
                    raise ValueError(
                        f"{what} {name!r} is no name for a folder: use letters, digits, dots, dashes and underscores,"
                        " and begin with a letter or digit"
                    )
        return self

    @property
    def folder(self) -> Path:
        """The evaluation's folder."""
        return self.run.folder / self.run.name

    def sampling_of(self, environment: EvaluatedEnvironment) -> SamplingSection:
        """How an environment is sampled: its own fields, and else the evaluation's."""
        own = environment.sampling.model_dump(exclude_none=True)
        return SamplingSection.model_validate(self.evaluation.sampling.model_dump() | own)

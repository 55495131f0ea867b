"""One request from its arrival to its last token."""

from dataclasses import dataclass, field

from hone.schema.sampling import SamplingParameters, VersionRun

TopLogprobs = list[tuple[int, float]]


@dataclass(slots=True, eq=False)
class Request:
    """What scheduler, runner and engine know about a request. token_ids are the prompt and then what was sampled.

    max_length: how long token_ids may become. stop_ids: tokens that end the completion. streams: its owner wants every
    token when it is sampled, not only the end.
    """

    request_id: str
    token_ids: list[int]
    max_length: int
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    streams: bool = False
    num_prompt: int = field(init=False)

    # The scheduler's: the keys and values of the first num_computed tokens are in `blocks` when the planned step is
    # done; num_cached of them came from the prefix cache at the first admission. No other running request has this row.
    arrival: int = -1
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    capacity: int = 0
    num_computed: int = 0
    num_cached: int = -1
    num_published: int = 0
    node: int = 0

    # The engine's: one logprob for each sampled token, and the closed runs of equal policy versions.
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    versions: list[VersionRun] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.token_ids)

    def close_version(self, version: int) -> None:
        """Everything sampled since the last closed run was sampled by `version`."""
        count = len(self.token_ids) - self.num_prompt - sum(run.count for run in self.versions)
        if count:
            self.versions.append(VersionRun(version, count))

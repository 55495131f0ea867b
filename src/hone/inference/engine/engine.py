"""The engine: requests in, tokens out, step by step, under weights that may change between two steps.

New weights take effect at once. Unfinished requests keep the keys and values computed under older weights and go on:
recomputing them would cost a prefill of everything under way at each optimizer step, and the importance ratios of the
loss correct for what the older keys and values change. Every token carries the version that sampled it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hone.config.recipe import EngineSection
from hone.inference.engine.kv_cache import KvCache
from hone.inference.engine.request import Request, TopLogprobs
from hone.inference.engine.runner import Runner, block_bytes
from hone.inference.engine.sampler import Sampled, Sampler
from hone.inference.engine.scheduler import RequestTooLong, Scheduler
from hone.model.checkpoint import load_model
from hone.model.transformer import Transformer
from hone.schema.sampling import FinishReason, Generate, Generated
from hone.schema.seeds import derive_seed

MAX_BYTES_PER_CHARACTER = 4

__all__ = ["Engine", "Finished", "NewToken", "RequestTooLong", "StepResult"]


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token of a request that streams."""

    request_id: str
    token_id: int
    logprob: float
    top_logprobs: TopLogprobs
    version: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A completion; `failure` says why it cannot be used."""

    generated: Generated
    top_logprobs: list[TopLogprobs]
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step brought to an end, and the new tokens of the requests that stream."""

    finished: list[Finished] = field(default_factory=list)
    new_tokens: list[NewToken] = field(default_factory=list)


class Engine:
    """Serves many requests with one model. Not thread-safe: one thread adds, cancels, steps and loads.

    decode: token ids to text, for stop strings. version: the policy version of the model's weights.
    """

    def __init__(
        self,
        model: Transformer,
        eos_token_ids: Iterable[int],
        settings: EngineSection,
        *,
        decode: Callable[[Sequence[int]], str] | None = None,
        version: int = 0,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.version = version
        self.num_sampled = 0
        self.num_computed = 0
        self._eos_token_ids = frozenset(eos_token_ids)
        self._decode = decode
        num_blocks = settings.num_blocks or settings.cache_bytes // block_bytes(model, settings.block_size)
        if num_blocks < 1:
            raise ValueError(
                f"engine.cache_bytes {settings.cache_bytes} is less than one KV block of"
                f" {block_bytes(model, settings.block_size)} bytes; raise it or lower engine.block_size"
            )
        self.max_context = min(settings.max_context or model.config.max_positions, model.config.max_positions)
        self._scheduler = Scheduler(
            KvCache(num_blocks, settings.block_size, prefix_cache=settings.prefix_cache),
            max_running=settings.max_running,
            max_batch_tokens=settings.max_batch_tokens,
            max_context=self.max_context,
        )
        self._runner = Runner(
            model,
            num_blocks=num_blocks,
            block_size=settings.block_size,
            max_running=settings.max_running,
            max_context=self.max_context,
        )
        self._sampler = Sampler(settings.max_running, model.embedding.device)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that requests refer to."""
        return self._scheduler.cache.usage

    def add(self, request: Generate, *, streams: bool = False) -> None:
        """Queue a request. `RequestTooLong` when its prompt fills the context; `ValueError` for other mistakes."""
        sampling = request.sampling
        self._check_token_ids(request.prompt_token_ids, "the prompt")
        self._check_token_ids(list(sampling.logit_bias), "logit_bias")
        if sampling.stop and self._decode is None:
            raise ValueError("stop strings need a tokenizer, and this engine has none; use stop_token_ids")
        seed = derive_seed(0, "request", request.request_id) if sampling.seed is None else sampling.seed
        max_tokens = self.max_context if sampling.max_tokens is None else sampling.max_tokens
        self._scheduler.add(
            Request(
                request.request_id,
                list(request.prompt_token_ids),
                len(request.prompt_token_ids) + max_tokens,
                sampling=sampling,
                seed=derive_seed(seed, "sampling"),
                stop_ids=self._stop_ids(request),
                streams=streams,
            )
        )

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its blocks; False when it is not (or no longer) known."""
        return self._scheduler.cancel(request_id) is not None

    @torch.inference_mode()
    def step(self) -> StepResult:
        """Compute and sample once; every request that could run got on."""
        plan = self._scheduler.schedule()
        if not plan.decodes and not plan.chunks:
            return StepResult()
        for request in plan.admitted:
            self._sampler.admit(request)
        logits, rows, positions = self._runner.run(plan)
        self.num_computed += plan.num_tokens
        requests = plan.decodes
        if plan.chunks:
            requests = requests + [chunk.request for chunk in plan.chunks if chunk.is_last]
        if not requests:
            self._scheduler.commit(plan, [])
            return StepResult()
        sampled = self._sampler.sample(logits, rows, positions)
        self._runner.record(rows, sampled.tokens_S)
        self.num_sampled += len(requests)
        ended = self._append(requests, sampled)
        self._scheduler.commit(plan, list(ended))
        return StepResult(
            [self._finish(request, reason) for request, reason in ended.items()],
            [self._new_token(request) for request in requests if request.streams],
        )

    def load_weights(self, weights: Path | Mapping[str, Tensor], version: int) -> None:
        """Go on under other weights: a folder, or a state dictionary of an equal model.

        A folder that is broken or does not fit leaves the engine as it was and raises what `load_model` raises.
        """
        if isinstance(weights, Path):
            weights = load_model(weights, self.model.embedding.dtype).state_dict()
        state = self.model.state_dict()
        if weights.keys() != state.keys():
            raise ValueError(f"these weights are of another model: {sorted(weights.keys() ^ state.keys())[:3]} differ")
        for name, target in state.items():
            target.copy_(weights[name])
        for request in self._scheduler.requests:
            request.close_version(self.version)
        self._scheduler.start_version()
        self.version = version

    def _check_token_ids(self, token_ids: list[int], what: str) -> None:
        size = self.model.config.vocabulary_size
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= size):
            wrong = next(i for i in token_ids if not 0 <= i < size)
            raise ValueError(f"{what} names token {wrong}, but the vocabulary has {size}")

    def _stop_ids(self, request: Generate) -> frozenset[int]:
        sampling = request.sampling
        ends = frozenset() if sampling.ignore_eos else self._eos_token_ids
        return ends.union(sampling.stop_token_ids) if sampling.stop_token_ids else ends

    def _append(self, requests: list[Request], sampled: Sampled) -> dict[Request, FinishReason]:
        """Give every request its token; which of them end with it, and why. This loop is hot: 256 times a step."""
        ended = {}
        tokens, logprobs = sampled.tokens_S.tolist(), sampled.logprobs_S.tolist()
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            token_ids = request.token_ids
            token_ids.append(token)
            request.logprobs.append(logprob)
            if token in request.stop_ids or (request.sampling.stop and self._ends_with_stop(request)):
                ended[request] = FinishReason.STOP
            elif len(token_ids) >= request.max_length:
                ended[request] = FinishReason.LENGTH
        for index, alternatives in sampled.top_logprobs.items():
            requests[index].top_logprobs.append(alternatives)
        return ended

    def _ends_with_stop(self, request: Request) -> bool:
        """Whether the last token completed a stop string: a window of tokens that could spell it is decoded."""
        assert self._decode is not None
        stops = request.sampling.stop
        window = MAX_BYTES_PER_CHARACTER * max(map(len, stops)) + 1
        text = self._decode(request.token_ids[max(request.num_prompt, len(request.token_ids) - window) :])
        return any(stop in text for stop in stops)

    def _finish(self, request: Request, reason: FinishReason) -> Finished:
        request.close_version(self.version)
        failure = None
        if not math.isfinite(sum(request.logprobs)):
            failure = f"the weights of version {self.version} give logits that are not finite"
        generated = Generated(
            request.request_id,
            request.token_ids[request.num_prompt :],
            request.logprobs,
            request.versions,
            reason,
            request.num_cached,
        )
        return Finished(generated, request.top_logprobs, failure)

    def _new_token(self, request: Request) -> NewToken:
        alternatives = request.top_logprobs[-1] if request.top_logprobs else []
        return NewToken(request.request_id, request.token_ids[-1], request.logprobs[-1], alternatives, self.version)

"""The training samples of one optimizer step as flat arrays.

N flat tokens, S sequences, T trained tokens (those whose logprob is wanted).
"""

import functools
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from hone.schema.batches import TrainingBatch
from hone.trainer.losses import Denominators, SampledTokens

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Samples:
    """The training samples of one optimizer step as flat arrays, every rank holds all of them."""

    lengths_S: Integers
    versions_S: Integers
    temperatures_S: Floats
    rewards_S: Floats
    token_ids_N: Integers
    trains_N: npt.NDArray[np.bool_]
    sampler_logprobs_N: Floats
    advantages_N: Floats

    @classmethod
    def from_batch(cls, batch: TrainingBatch) -> Self:
        lengths_S = np.frombuffer(batch.lengths, "<i4").astype(np.int64)
        trains_N = np.frombuffer(batch.loss_mask, np.uint8).astype(np.bool_)
        # Nothing precedes a first token, so nothing predicts it.
        trains_N[starts_of(lengths_S)[:-1][lengths_S > 0]] = False
        return cls(
            lengths_S=lengths_S,
            versions_S=np.frombuffer(batch.versions, "<i4").astype(np.int64),
            temperatures_S=np.frombuffer(batch.temperatures, "<f4"),
            rewards_S=np.frombuffer(batch.rewards, "<f4"),
            token_ids_N=np.frombuffer(batch.token_ids, "<i4").astype(np.int64),
            trains_N=trains_N,
            sampler_logprobs_N=np.frombuffer(batch.logprobs, "<f4"),
            advantages_N=np.frombuffer(batch.advantages, "<f4"),
        )

    def to_batch(self, step: int) -> TrainingBatch:
        """The inverse of `from_batch`, to keep a batch for inspection."""
        return TrainingBatch(
            step=step,
            num_groups=0,
            lengths=self.lengths_S.astype("<i4").tobytes(),
            versions=self.versions_S.astype("<i4").tobytes(),
            temperatures=self.temperatures_S.astype("<f4").tobytes(),
            rewards=self.rewards_S.astype("<f4").tobytes(),
            token_ids=self.token_ids_N.astype("<i4").tobytes(),
            loss_mask=self.trains_N.astype(np.uint8).tobytes(),
            logprobs=self.sampler_logprobs_N.astype("<f4").tobytes(),
            advantages=self.advantages_N.astype("<f4").tobytes(),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_N)

    @property
    def starts(self) -> Integers:
        """Where each sample begins in the flat arrays, and where the last one ends."""
        return starts_of(self.lengths_S)

    @property
    def context_lengths(self) -> Integers:
        """How many tokens of each sample come before its first trained one; all of them where none trains."""
        return self._ends_of_training[0]

    @property
    def needed_lengths(self) -> Integers:
        """How many tokens of each sample must be forwarded: those before its last trained one; 0 where none trains."""
        return self._ends_of_training[1]

    @functools.cached_property
    def _ends_of_training(self) -> tuple[Integers, Integers]:
        sequence_T = np.repeat(np.arange(len(self.lengths_S)), self.lengths_S)[self.trains_N]
        place_T = np.flatnonzero(self.trains_N) - self.starts[sequence_T]
        first_S, last_S = self.lengths_S.copy(), np.zeros_like(self.lengths_S)
        np.minimum.at(first_S, sequence_T, place_T)
        np.maximum.at(last_S, sequence_T, place_T)
        return first_S, last_S

    @property
    def families(self) -> list[list[int]]:
        """Samples that follow one another with the same tokens before their first trained one."""
        heads = family_heads(self, self.starts[:-1], self.context_lengths)
        breaks = np.flatnonzero(np.diff(heads)) + 1
        return [part.tolist() for part in np.split(np.arange(len(heads)), breaks)] if len(heads) else []

    def denominators(self) -> Denominators:
        num_tokens_S = np.add.reduceat(np.append(self.trains_N, False), self.starts[:-1], dtype=np.int64)
        num_tokens_S[self.lengths_S == 0] = 0
        return Denominators(max(1, int(num_tokens_S.sum())), max(1, int((num_tokens_S > 0).sum())))

    def trained_tokens(self) -> SampledTokens:
        """All trained tokens of the step, in the order of the samples."""
        places_T = np.flatnonzero(self.trains_N)
        return SampledTokens(
            sampler_logprobs_T=torch.from_numpy(self.sampler_logprobs_N[places_T]),
            advantages_T=torch.from_numpy(self.advantages_N[places_T]),
            sequence_ids_T=torch.from_numpy(np.repeat(np.arange(len(self.lengths_S)), self.lengths_S)[places_T]),
            num_sequences=len(self.lengths_S),
        )


def family_heads(samples: Samples, starts_S: Integers, contexts_S: Integers) -> Integers:
    """For each sample the first one with the same context: itself where there is none before."""
    first: dict[bytes, int] = {}
    contexts = zip(starts_S.tolist(), contexts_S.tolist(), strict=True)
    return np.array(
        [
            first.setdefault(samples.token_ids_N[start : start + context].tobytes(), index)
            for index, (start, context) in enumerate(contexts)
        ]
    )


def starts_of(lengths_S: Integers) -> Integers:
    """Where each of some sequences begins behind the others, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_S)])

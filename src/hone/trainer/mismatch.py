"""How far trainer and sampler disagree about the same tokens, as metrics of one step.

T trained tokens of the whole step, over all ranks.
"""

import torch
from torch import Tensor

from hone.trainer.losses import log_ratio


def mismatch_metrics(logprobs_T: Tensor, sampler_logprobs_T: Tensor) -> dict[str, float]:
    """Estimates over the tokens of a step; the ratio is trainer over sampler.

    mismatch_kl: KL of sampler to trainer (k3). ess: effective sample size as a share of the tokens, 1 where nothing
    differs. logprob_difference_max and _p99: of |trainer - sampler|, 0 in strict mode at staleness 0.
    entropy: of the sampler, estimated from what it sampled.
    """
    difference_T = (logprobs_T - sampler_logprobs_T).abs()
    log_ratio_T = log_ratio(logprobs_T, sampler_logprobs_T).double()
    ratio_T = log_ratio_T.exp()
    return {
        "train/mismatch_kl": (ratio_T - log_ratio_T - 1).mean().item(),
        "train/ess": (ratio_T.sum().square() / (len(ratio_T) * ratio_T.square().sum())).item(),
        "train/logprob_difference_max": difference_T.max().item(),
        "train/logprob_difference_p99": _upper_percentile(difference_T, 0.99),
        "train/ratio_max": ratio_T.max().item(),
        "train/entropy": -sampler_logprobs_T.mean().item(),
    }


def _upper_percentile(values_T: Tensor, share: float) -> float:
    # torch.quantile refuses more than 2^24 values; kthvalue is the same without interpolation.
    rank = min(len(values_T), int(share * len(values_T)) + 1)
    return torch.kthvalue(values_T, rank).values.item()

"""Whether an owner may have another sandbox: what it has beside its quota, and how fast it asks."""

import math
from dataclasses import dataclass

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.gateway.ledger import Totals
from hone.sandbox.gateway.tenants import Quota
from hone.schema.sandboxes import Outcome, SandboxSpec

FULL_SECONDS = 1.0  # after which one may ask again for what the quota had no room for


def check_quota(quota: Quota, totals: Totals, spec: SandboxSpec) -> None:
    """Raises `Busy` where others have to end first, `SandboxError` (policy denied) where that would not help."""
    wanted = {
        "sandboxes": (totals.num_sandboxes, 1.0, quota.max_sandboxes),
        "MB of memory": (totals.memory_mb, spec.memory_mb, quota.max_memory_mb),
        "cpus": (totals.cpus, spec.cpus, quota.max_cpus),
    }
    for what, (_, more, most) in wanted.items():
        if more > most:
            raise SandboxError(
                f"{more:g} {what} for one sandbox are more than the quota of {most:g}", Outcome.POLICY_DENIED
            )
    for what, (held, more, most) in wanted.items():
        if held + more > most + 1e-6:
            raise Busy(f"the quota of {most:g} {what} has no room for {more:g} more beside {held:g}", FULL_SECONDS)


@dataclass(slots=True)
class Rate:
    """A bucket of tokens: so many at once, so many more a second."""

    per_second: float
    at_once: float
    left: float = 0.0
    filled: float = float("-inf")

    def wait_seconds(self, now: float) -> float:
        """Take one and return 0; or how long until there is one."""
        if math.isinf(self.per_second):
            return 0.0
        self.left = min(self.at_once, self.left + self.per_second * (now - self.filled))
        self.filled = now
        if self.left >= 1.0:
            self.left -= 1.0
            return 0.0
        return (1.0 - self.left) / self.per_second

"""The runtimes there are, and what a machine lacks for each."""

from hone.sandbox.cells.host import MIN_KERNEL, Host
from hone.sandbox.cells.runtimes.bwrap import BwrapRuntime
from hone.sandbox.cells.runtimes.gvisor import GvisorRuntime
from hone.sandbox.cells.runtimes.oci import OciRuntime
from hone.sandbox.cells.runtimes.process import ProcessRuntime
from hone.sandbox.cells.runtimes.runtime import Feature, Runtime
from hone.schema.sandboxes import RuntimeName

OTHERS: dict[RuntimeName, Runtime] = {
    "process": ProcessRuntime(),
    "bwrap": BwrapRuntime(),
    "oci": OciRuntime(),
    "gvisor": GvisorRuntime(),
}
"""All but cells."""


def features(runtime: RuntimeName) -> frozenset[Feature]:
    """What a runtime can do of what not every one can."""
    return frozenset(Feature) if runtime == "cell" else OTHERS[runtime].features


def missing(runtime: RuntimeName, host: Host, *, is_weak_allowed: bool = False) -> str:
    """What this machine lacks for a runtime, in a clause that ends a sentence; empty where it works."""
    if runtime != "cell":
        return OTHERS[runtime].missing(host)
    if host.kernel < MIN_KERNEL:
        return f"Linux {MIN_KERNEL[0]}.{MIN_KERNEL[1]}"
    if not host.has_user_namespaces:
        return "user namespaces, which this machine does not give; `hone sandbox doctor` says more"
    if not host.has_seccomp and not is_weak_allowed:
        return "a kernel that filters system calls; is_weak_allowed=True goes on without"
    return ""

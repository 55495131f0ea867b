"""The runtime `oci`: crun or runc makes the sandbox from a bundle, with the agent as its program, and is not asked again."""

import resource
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from hone.sandbox.cells.host import Host
from hone.sandbox.cells.plan import (
    ATTRIBUTE_NO_DEVICES,
    ATTRIBUTE_NO_SETUID,
    ATTRIBUTE_READ_ONLY,
    FIRST_BIND,
    FIRST_LAYER,
    INODES_PER_MB,
    NEW_MOUNTS,
    NEW_USERS,
    NO_DEVICES,
    NO_SETUID,
    STAGE,
    Bind,
    Code,
    Operation,
    affinity,
    id_maps,
    mount,
    plan_spawner,
    resource_limits,
)
from hone.sandbox.cells.runtimes.oci_config import Bundle, Seen, configuration
from hone.sandbox.cells.runtimes.runtime import AGENT, Birth, Feature, Launch, launch_plan, require, texts

NEW_CGROUPS = 0x02000000
ROOT, BUNDLE, EXTRA, BINDS = f"{STAGE}/root", f"{STAGE}/bundle", f"{STAGE}/extra", f"{STAGE}/binds"


class OciRuntime:
    """A container runtime that other things of a site are run by, too.

    Its program is started in the user namespace of the sandbox, where it is root, and in the sandbox's cgroup, which it
    leaves alone. The root file system is put together before, as that of a cell is.
    """

    name = "oci"
    features = frozenset(
        {
            Feature.TERMINAL,
            Feature.PROCESSES,
            Feature.IMAGES,
            Feature.LOOPBACK,
            Feature.HOST_NETWORK,
            Feature.DISK_SUM,
            Feature.MOVED_BINDS,
        }
    )

    def missing(self, host: Host) -> str:
        """What this machine lacks for it, in a clause; empty where it works."""
        if not {"crun", "runc"} & host.programs.keys():
            return "the program crun or runc"
        if not host.has_user_namespaces:
            return "user namespaces"
        if not host.has_seccomp:
            return "a kernel that filters system calls"
        return ""

    def prelude(self, host: Host) -> tuple[Operation, ...]:
        """A view of mounts of its own."""
        return plan_spawner(is_unprivileged=not host.has_id_ranges, uid=host.uid, gid=host.gid, own_network=False)

    def launch(self, birth: Birth, host: Host) -> Launch:
        """How a sandbox is started; raises `Unsupported` for what it asks for and this runtime cannot give."""
        require(self.name, self.features, birth.spec, birth.image)
        limits, late = resource_limits(birth.spec, birth.grants), {}
        if not host.has_id_ranges and resource.RLIMIT_AS in limits:  # runc itself needs more than many a sandbox
            late[resource.RLIMIT_AS] = limits.pop(resource.RLIMIT_AS)
        operations = (*_steps(birth, self.command(host), limits),)
        plan = launch_plan(
            operations,
            namespaces=NEW_USERS | NEW_MOUNTS | NEW_CGROUPS,
            maps=id_maps(birth.grants),
            layers=birth.image.layers,
            maps_layers=birth.grants.num_ids > 1,
        )
        return Launch(plan, birth.image, late_limits=late)

    def command(self, host: Host) -> list[str]:
        """How a bundle is run, up to where it lies. crun refuses to look at cgroups of both versions at once."""
        if "crun" in host.programs:
            return [str(host.programs["crun"]), "--cgroup-manager=disabled", "--root", f"{STAGE}/state"]
        return [str(host.programs["runc"]), "--root", f"{STAGE}/state"]


def _steps(birth: Birth, command: Sequence[str], limits: Mapping[int, int]) -> Iterator[Operation]:
    grants, spec = birth.grants, birth.spec
    binds = (*birth.image.binds, *birth.binds, Bind(str(birth.agent), AGENT, is_file=True))
    yield from (Operation(Code.JOIN, a=index) for index in grants.join)
    yield Operation(Code.GUARD)
    for slot, bind in enumerate(binds, start=FIRST_BIND):
        yield Operation(Code.TAKE_TREE, texts([bind.source]), a=slot, b=1)
    yield Operation(Code.IDENTITY)
    size = f"size={spec.disk_mb}m,nr_inodes={max(4096, spec.disk_mb * INODES_PER_MB)},mode=755"
    yield mount("tmpfs", STAGE, "tmpfs", NO_SETUID | NO_DEVICES, size)
    for path, mode in ((ROOT, 0o755), (BUNDLE, 0o700), (BINDS, 0o755), (f"{STAGE}/shm", 0o1777)):
        yield Operation(Code.MAKE_FOLDER, texts([path]), a=mode)
    # A tree of cgroups in which the sandbox's is the root: both programs want to see one, whatever the machine has.
    yield from folders(STAGE, "/fs/cgroup")
    yield mount("cgroup2", f"{STAGE}/fs/cgroup", "cgroup2", NO_SETUID | NO_DEVICES)
    yield from _root(birth)
    seen = []
    for slot, bind in enumerate(binds, start=FIRST_BIND):
        place = f"{BINDS}/{slot}"
        made = Operation(Code.WRITE, texts([place]), a=0o644) if bind.is_file else _folder(place)
        attributes = ATTRIBUTE_NO_SETUID | ATTRIBUTE_NO_DEVICES | (0 if bind.is_writable else ATTRIBUTE_READ_ONLY)
        yield from (made, Operation(Code.PUT_TREE, texts([place]), a=slot, b=attributes))
        seen.append(Seen(place, bind.target, bind.is_writable))
    bundle = Bundle(
        root=ROOT,
        shared_memory=f"{STAGE}/shm",
        program=AGENT,
        seen=tuple(seen),
        masked=grants.masked,
        limits=limits,
        has_sockets=spec.network != "off",
        has_own_network=spec.network != "host",
    )
    yield Operation(Code.WRITE, texts([f"{BUNDLE}/config.json"]) + configuration(bundle), a=0o600)
    yield affinity(grants.cores)
    words = [*command, "run", "--preserve-fds", "1", "--bundle", BUNDLE, birth.name]
    yield Operation(Code.EXECUTE, texts(words), a=birth.said)


def _root(birth: Birth) -> Iterator[Operation]:
    """The root before anything is seen in it. What an image adds is a layer of its own, as the links of other layers could
    lead what is written into them outside.
    """
    image, layers = birth.image, birth.image.layers
    base = EXTRA if layers else ROOT
    if layers:
        for name in ("extra", "layer", "scratch"):
            yield _folder(f"{STAGE}/{name}")
    yield from folders(base, image.working_folder)
    yield from folders(base, "/tmp", 0o1777)
    for path, content in image.files:
        yield from folders(base, str(PurePosixPath(path).parent))
        yield Operation(Code.WRITE, texts([base + path]) + content, a=0o644)
    for path, target in image.links:
        yield from folders(base, str(PurePosixPath(path).parent))
        yield Operation(Code.LINK, texts([target, base + path]))
    if layers:
        for number in range(len(layers)):
            yield _folder(f"{STAGE}/{number}")
            yield Operation(Code.PUT_TREE, texts([f"{STAGE}/{number}"]), a=FIRST_LAYER + number)
        lower = ":".join([EXTRA, *(f"{STAGE}/{number}" for number in range(len(layers)))])
        options = f"lowerdir={lower},upperdir={STAGE}/layer,workdir={STAGE}/scratch,userxattr"
        yield mount("overlay", ROOT, "overlay", NO_SETUID | NO_DEVICES, options)


def folders(base: str, path: str, mode: int = 0o755) -> Iterator[Operation]:
    """The steps that make a folder below another one, and those above it; those that are there will do."""
    for part in [*reversed(PurePosixPath(path).parents), PurePosixPath(path)]:
        if str(part) != "/":
            yield Operation(Code.MAKE_FOLDER, texts([f"{base}{part}"]), a=mode if str(part) == path else 0o755, b=1)


def _folder(path: str) -> Operation:
    return Operation(Code.MAKE_FOLDER, texts([path]), a=0o755)

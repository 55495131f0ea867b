"""The page of the reference about the door to sandboxes: what somebody wants, and the names that there are for it."""

import sys
from pathlib import Path

from hone.config.public_names import Page, Part

INTRODUCTION = """\
# Sandboxes, from Python

Generated from the docstrings of `hone.sandbox.client` by `make docs`; do not edit.

Names without a module are imported from `hone.sandbox.client`, the others from the module that stands before them.
[Sandboxes here and on nodes](../guides/sandbox-nodes.md) is the way in. What environments see of a sandbox is less, and is
told in [the environments library](environments-api.md#sandboxes).
"""

PARTS = (
    Part(
        "A sandbox",
        "Programs, Python, files, ports and the lease of one.",
        ("Sandbox", "SandboxSpec", "Process", "Connection", "hone.sandbox.network.ports.Forwarding"),
    ),
    Part(
        "What came of it",
        "[Results and errors](../guides/sandbox-nodes.md#results-and-errors) has them side by side.",
        (
            *("ExecResult", "Outcome", "hone.schema.sandboxes.Usage", "PythonResult", "SandboxUsage"),
            *("SandboxError", "Busy", "Unsupported"),
        ),
    ),
    Part(
        "Files and their states",
        "[Files, images and Python of sandboxes](../guides/sandbox-files-images-python.md).",
        ("FileEntry", "Transfer", "LimitExceeded", "Snapshot"),
    ),
    Part(
        "The network",
        "[The network of sandboxes](../guides/sandbox-network.md).",
        ("NetworkRecord", "Verdict"),
    ),
    Part(
        "Code of any language",
        "[Sandboxes for programs that others wrote](../guides/sandbox-bridges.md#code-of-any-language).",
        (
            "run_code",
            "build_code",
            "CodeResult",
            "Built",
            "Language",
            "LANGUAGES",
            "ToolchainMissing",
            "session_program",
        ),
    ),
    Part(
        "Nodes",
        "Who leases them. Behind an address a node is an address, and there is nothing to import for it.",
        ("embedded_node", "hone.sandbox.node.node.Node", "hone.sandbox.node.lifecycle.Limits"),
    ),
)

PAGE = Page("sandboxes-api.md", "hone.sandbox.client", INTRODUCTION, PARTS)

if __name__ == "__main__":
    PAGE.write(Path(sys.argv[1]))

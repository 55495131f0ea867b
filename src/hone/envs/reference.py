"""The page of the reference about this package: what an author wants, and the names that there are for it."""

import sys
from pathlib import Path

from hone.config.public_names import Page, Part

INTRODUCTION = """\
# The environments library

Generated from the docstrings of `hone.envs` by `make docs`; do not edit.

Names without a module are imported from `hone.envs`, the others from the module that stands before them.
[Write an environment](../guides/write-an-environment.md) is the way in; each part names the guide that shows it at work.
"""


PARTS = (
    Part(
        "Tasks",
        "Where tasks come from: [Tasks and mixtures](../guides/tasks-and-mixtures.md).",
        (
            *("Task", "Tasks", "Split", "Duplicate", "concatenated", "is_held_out", "columns", "Row", "jsonl_tasks"),
            *("parquet_tasks", "dataset_tasks", "generated", "endless", "TaskSourceError"),
        ),
    ),
    Part(
        "Messages",
        "Conversations in the shape of the OpenAI API, and short ways to write them.",
        ("Message", "ToolCall", "ToolSpec", "system", "user", "assistant", "tool_call", "tool_result"),
    ),
    Part(
        "Environments and rollouts",
        "The course of a rollout: [Write an environment](../guides/write-an-environment.md).",
        ("Environment", "EnvironmentArguments", "SingleTurn", "MultiTurn", "Rollout", "Limits"),
    ),
    Part(
        "Rewards",
        "What rollouts are judged by: [Rewards](../guides/rewards.md).",
        ("Rubric", "reward", "metric", "group_reward", "group_metric", "Measure", "hone.envs.rubric.Scores"),
    ),
    Part(
        "Reading answers",
        "[Parsers](../guides/rewards.md#parsers) for rewards.",
        modules=("hone.envs.parsers",),
    ),
    Part(
        "Verifiers",
        "Ready checks of answers, to be declared as rewards: [Verifiers](../guides/rewards.md#verifiers), and for"
        " programs [Sandboxes and code rewards](../guides/sandboxes-and-code.md#rewards-for-code).",
        (
            "hone.envs.verifiers.math.is_equivalent",
            "hone.envs.verifiers.regex.matches",
            "hone.envs.verifiers.json_schema.fits_schema",
            *(
                f"hone.envs.verifiers.ifeval.{name}"
                for name in ("follows_all", "share_followed", "followed", "Instruction", "instructions_of")
            ),
            *(
                f"hone.envs.verifiers.code.{name}"
                for name in ("CodeVerifier", "Assertions", "Calls", "Call", "InputsOutputs", "CodeVerdict")
            ),
        ),
        modules=("hone.envs.verifiers.match",),
    ),
    Part(
        "Judges",
        "Models that give rewards: [Judges](../guides/rewards.md#judges).",
        modules=("hone.envs.judges",),
    ),
    Part(
        "Tools",
        "What the policy can call: [Tools](../guides/tools.md).",
        (
            *("tool", "ToolUse", "Tool", "Toolset", "ToolError", "ToolArgumentsError", "UnknownToolError"),
            "hone.envs.mcp.McpServer",
        ),
    ),
    Part(
        "Sandboxes",
        "Where programs of the policy run: [Sandboxes and code rewards](../guides/sandboxes-and-code.md).",
        (
            *("SandboxToolUse", "SandboxState", "LazySandbox", "LocalProcesses", "PythonSession", "SandboxSpec"),
            *("ExecResult", "Outcome", "Sandbox", "SandboxProvider", "sandboxes_at"),
            "hone.schema.sandboxes.Usage",
            "hone.envs.sandboxes.Process",
            "hone.envs.local_processes.LocalSandbox",
            "hone.envs.providers.NodeSandboxes",
            "hone.envs.sandbox_tools.python_tool",
            "hone.envs.sandbox_tools.shell_tool",
        ),
    ),
    Part(
        "Several agents",
        "Self-play, proposers and solvers, simulated users: [Several agents](../guides/several-agents.md).",
        ("MultiAgent", "Agent", "Seat", "ChatModel", "Fixed", "hone.envs.agents.Model"),
    ),
    Part(
        "Games and other libraries",
        "Objects with reset and step, and environments that others wrote: [Gym-style environments and"
        " bridges](../guides/gym-and-bridges.md).",
        (
            *("GymEnvironment", "Episode", "seeded_tasks"),
            "hone.envs.bridges.BridgeError",
            "hone.envs.bridges.gymnasium.load_environment",
            "hone.envs.bridges.reasoning_gym.load_environment",
            "hone.envs.bridges.reasoning_gym.flaws",
            "hone.envs.bridges.inspect_ai.load_environment",
            "hone.envs.bridges.inspect_ai.environment_from",
        ),
    ),
    Part(
        "Harnesses",
        "Agent programs as environments: [Harnesses](../guides/harnesses.md).",
        (
            *("ProgramHarness", "SdkHarness", "Harness", "Endpoint", "ProgramRun", "SandboxRun"),
            *("Workplace", "ProgramCrash"),
            "hone.envs.harness.process.Output",
        ),
    ),
    Part(
        "Failures",
        "What is no reward: [Failures are not rewards](../concepts/traces-tokens-versions.md#failures-are-not-rewards).",
        ("FailureClass", "RolloutFailure", "failures_as", "hone.envs.failures.deadline"),
    ),
    Part(
        "Running rollouts, and their traces",
        "For programs that run environments themselves, and for reading what they leave: [Traces, tokens and"
        " versions](../concepts/traces-tokens-versions.md).",
        (
            *("run_rollout", "run_group", "Sampler", "SamplingParameters", "Turn", "Trace", "StopReason"),
            "hone.schema.sampling.FinishReason",
            "hone.schema.sampling.VersionRun",
            *(f"hone.schema.traces.{name}" for name in ("Node", "Reward", "Failure", "Timing", "AgentRecord")),
        ),
    ),
    Part(
        "Proving and judging again",
        "Environments tested without a model: [Prove it](../guides/write-an-environment.md#3-prove-it-without-a-model).",
        (
            *("play", "check_gold"),
            "hone.envs.validation.GoldError",
            "hone.envs.checks.validate",
            "hone.envs.checks.Check",
            "hone.envs.replay.replay",
            "hone.envs.replay.Replayed",
        ),
    ),
    Part(
        "Packages",
        "Environments by the names that recipes use, also those with [a Python of their own](../guides/own-dependencies.md).",
        (
            *("load_environment", "installed_environments", "EnvironmentLoadError"),
            "hone.envs.registry.load_folder",
            "hone.envs.remote.environment_of",
        ),
    ),
    Part(
        "Types in signatures",
        "Short names for what is given and returned above.",
        (
            "hone.schema.messages.Role",
            "hone.envs.environment.WrongAnswer",
            "hone.envs.sources.Count",
            "hone.envs.rows.TaskOf",
            "hone.envs.tools.Function",
            "hone.envs.tools.Hidden",
            "hone.envs.tools.ErrorPolicy",
            "hone.envs.tools.OnError",
            "hone.envs.mcp.Settings",
            "hone.envs.mcp.MakeClient",
            "hone.envs.parsers.Which",
            "hone.envs.harness.environment.HarnessArguments",
            "hone.envs.harness.environment.OnCrash",
            "hone.envs.harness.environment.Agent",
        ),
    ),
)

PAGE = Page("environments-api.md", "hone.envs", INTRODUCTION, PARTS)

if __name__ == "__main__":
    PAGE.write(Path(sys.argv[1]))

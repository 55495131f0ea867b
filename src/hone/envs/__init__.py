"""What an environment author imports: tasks, environments, rewards and metrics, and the rollout they see."""

from hone.envs.agents import Agent, ChatModel, Fixed, MultiAgent, Seat
from hone.envs.environment import Environment, EnvironmentArguments, MultiTurn, SingleTurn
from hone.envs.failures import RolloutFailure, failures_as
from hone.envs.gym import Episode, GymEnvironment, seeded_tasks
from hone.envs.harness import (
    Endpoint,
    Harness,
    ProgramCrash,
    ProgramHarness,
    ProgramRun,
    SandboxRun,
    SdkHarness,
    Workplace,
)
from hone.envs.local_processes import LocalProcesses
from hone.envs.messages import assistant, system, tool_call, tool_result, user
from hone.envs.providers import sandboxes_at
from hone.envs.registry import EnvironmentLoadError, installed_environments, load_environment
from hone.envs.rollout import Limits, Rollout, run_group, run_rollout
from hone.envs.rows import Row, columns, dataset_tasks, jsonl_tasks, parquet_tasks
from hone.envs.rubric import Measure, Rubric, group_metric, group_reward, metric, reward
from hone.envs.sampler import Sampler
from hone.envs.sandbox_tools import SandboxState, SandboxToolUse
from hone.envs.sandboxes import LazySandbox, Sandbox, SandboxProvider
from hone.envs.sessions import PythonSession
from hone.envs.sources import Duplicate, Split, Tasks, TaskSourceError, concatenated, is_held_out
from hone.envs.streams import endless, generated
from hone.envs.tools import Tool, ToolArgumentsError, ToolError, Toolset, ToolUse, UnknownToolError, tool
from hone.envs.validation import check_gold, play
from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.schema.sampling import SamplingParameters, Turn
from hone.schema.sandboxes import ExecResult, Outcome, SandboxSpec
from hone.schema.tasks import Task
from hone.schema.traces import FailureClass, StopReason, Trace

__all__ = [
    "Agent",
    "ChatModel",
    "Duplicate",
    "Endpoint",
    "Environment",
    "EnvironmentArguments",
    "EnvironmentLoadError",
    "Episode",
    "ExecResult",
    "FailureClass",
    "Fixed",
    "GymEnvironment",
    "Harness",
    "LazySandbox",
    "Limits",
    "LocalProcesses",
    "Measure",
    "Message",
    "MultiAgent",
    "MultiTurn",
    "Outcome",
    "ProgramCrash",
    "ProgramHarness",
    "ProgramRun",
    "PythonSession",
    "Rollout",
    "RolloutFailure",
    "Row",
    "Rubric",
    "Sampler",
    "SamplingParameters",
    "Sandbox",
    "SandboxProvider",
    "SandboxRun",
    "SandboxSpec",
    "SandboxState",
    "SandboxToolUse",
    "SdkHarness",
    "Seat",
    "SingleTurn",
    "Split",
    "StopReason",
    "Task",
    "TaskSourceError",
    "Tasks",
    "Tool",
    "ToolArgumentsError",
    "ToolCall",
    "ToolError",
    "ToolSpec",
    "ToolUse",
    "Toolset",
    "Trace",
    "Turn",
    "UnknownToolError",
    "Workplace",
    "assistant",
    "check_gold",
    "columns",
    "concatenated",
    "dataset_tasks",
    "endless",
    "failures_as",
    "generated",
    "group_metric",
    "group_reward",
    "installed_environments",
    "is_held_out",
    "jsonl_tasks",
    "load_environment",
    "metric",
    "parquet_tasks",
    "play",
    "reward",
    "run_group",
    "run_rollout",
    "sandboxes_at",
    "seeded_tasks",
    "system",
    "tool",
    "tool_call",
    "tool_result",
    "user",
]

"""What is in deploy/ fits the programs that read it: Kubernetes, systemd, Slurm, Prometheus, Grafana, and our own command line."""

import copy
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client.core import Metric
from typer.core import TyperGroup

from hone.cli.main import app
from hone.sandbox.cells.host import look
from hone.sandbox.gateway.discovery import Fixed
from hone.sandbox.gateway.gateway import Gateway
from hone.sandbox.gateway.metrics import GatewayCollector
from hone.sandbox.gateway.tenants import read_tenants
from hone.sandbox.node.metrics import NodeCollector
from hone.sandbox.node.node import Node
from hone.sandbox.wire.addresses import parse_address

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = sorted(path for path in (DEPLOY / "kubernetes").rglob("*.yaml") if path.name != "kustomization.yaml")
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SBATCH = DEPLOY / "slurm" / "sandbox-nodes.sbatch"
KNOWN_SUFFIXES = ("_total", "_bucket", "_count", "_sum")


def documents(path: Path) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def needs(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"there is no {program}")
    return found


# --- our own command line


def commands() -> list[tuple[str, list[str]]]:
    """Where, and the words after `hone`, of every command in deploy/."""
    found = []
    for path in UNITS:
        environment = dict(re.findall(r"^([A-Z_]+)=(.*)$", environment_of(path).read_text(), re.M))
        for line in re.findall(r"^ExecStart=(.*)$", path.read_text(), re.M):
            words = expanded(line, environment)
            assert words[0].endswith("/hone")
            found.append((path.name, words[1:]))
    for path in KUBERNETES:
        for one in documents(path):
            for container in one.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ()):
                if "args" in container:
                    found.append((path.name, container["args"]))
    call = re.search(r'exec "\$HONE" (sandbox serve.*?)\n\'', SBATCH.read_text(), re.S)
    assert call is not None
    found.append((SBATCH.name, shlex.split(call[1].replace("\\\n", " "))))
    for path in sorted(one for one in DEPLOY.rglob("*") if one.is_file()):
        for line in re.findall(r"^# +(?:\w+=\S+ )*hone (sandbox .*)$", path.read_text(), re.M):
            found.append((f"{path.name} (comment)", shlex.split(line)))
    return found


def expanded(line: str, environment: dict[str, str]) -> list[str]:
    """As systemd does it: ${NAME} within a word, $NAME for any number of words."""
    words = []
    for word in line.split():
        if word.startswith("$") and not word.startswith("${"):
            words += shlex.split(environment[word[1:]])
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda name: environment.get(name[1], "x"), word))
    return words


def environment_of(unit: Path) -> Path:
    name = re.search(r"EnvironmentFile=/etc/hone/(\S+)", unit.read_text())
    assert name is not None
    return unit.parent / name[1]


@pytest.mark.parametrize(
    ("where", "words"), [pytest.param(*one, id=f"{one[0]}-{i}") for i, one in enumerate(commands())]
)
def test_commands_and_their_options_exist(where, words):
    command: Any = typer.main.get_command(app)
    words = list(words)
    while isinstance(command, TyperGroup):
        command = command.commands[words.pop(0)]
    context = command.make_context(where, [re.sub(r"\$\(?\w+\)?|\$HONE_\w+", "1", word) for word in words])
    assert context.params  # it was parsed: unknown options and values of the wrong kind are errors


def test_the_commands_of_all_that_runs_are_looked_at():
    places = {where for where, _ in commands()}
    assert {
        "hone-sandbox-node.service",
        "hone-sandbox-gateway.service",
        "nodes.yaml",
        "gateway.yaml",
        SBATCH.name,
    } <= places


# --- Kubernetes


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_manifests_fit_the_schemas_of_kubernetes(path):
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate is not installed")
    import kubernetes_validate

    for one in documents(path):
        if path.parent.name == "cgroups":
            one = merged(node_set(), one)
        kubernetes_validate.validate(one, "1.33", strict=True)


def node_set() -> dict[str, Any]:
    return next(one for one in documents(DEPLOY / "kubernetes/base/nodes.yaml") if one["kind"] == "DaemonSet")


def merged(base: Any, patch: Any) -> Any:
    """As kustomize merges: containers by name, other lists replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {key: merged(base.get(key), patch.get(key, base.get(key))) for key in {**base, **patch}}
    if isinstance(base, list) and all(isinstance(one, dict) and "image" in one for one in base) and patch is not base:
        by_name = {one["name"]: one for one in patch}
        return [merged(one, by_name.get(one["name"], one)) for one in base]
    return copy.deepcopy(patch)


def test_manifests_belong_together():
    everything = [one for path in KUBERNETES for one in documents(path)]
    secrets = {one["metadata"]["name"]: set(one["stringData"]) for one in everything if one["kind"] == "Secret"}
    workloads = [one for one in everything if one["kind"] in ("DaemonSet", "Deployment") and "selector" in one["spec"]]
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in workloads]
    for one in workloads:
        assert one["spec"]["selector"]["matchLabels"] == one["spec"]["template"]["metadata"]["labels"]
        pod = one["spec"]["template"]["spec"]
        [container] = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert {volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume} <= set(secrets)
        for variable in container["env"]:
            if "secretKeyRef" in variable["valueFrom"]:
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["key"] in secrets[reference["name"]]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container.get(probe, {})
            assert (asked.get("httpGet") or asked.get("tcpSocket") or {"port": next(iter(ports))})["port"] in ports
        for argument in container["args"]:
            if match := re.fullmatch(r"--listen=tcp://.*:(\d+)", argument):
                assert int(match[1]) == ports["sandboxes"]
            if match := re.fullmatch(r"--metrics-port=(\d+)", argument):
                assert int(match[1]) == ports["metrics"]
    for one in everything:
        if one["kind"] in ("Service", "PodDisruptionBudget"):
            selector = one["spec"]["selector"]
            assert selector.get("matchLabels", selector) in labels
    gateway = next(one for one in workloads if one["kind"] == "Deployment")
    [nodes] = [
        one for one in gateway["spec"]["template"]["spec"]["containers"][0]["args"] if one.startswith("--nodes=")
    ]
    assert nodes == "--nodes=dns:hone-sandbox-nodes:7300"
    assert any(one["kind"] == "Service" and one["metadata"]["name"] == "hone-sandbox-nodes" for one in everything)


def test_a_pod_has_time_to_drain():
    pod = node_set()["spec"]["template"]["spec"]
    drain = next(one for one in pod["containers"][0]["args"] if one.startswith("--drain-seconds="))
    assert pod["terminationGracePeriodSeconds"] > float(drain.partition("=")[2])


def test_the_example_of_tenants_can_be_read(tmp_path):
    secrets = documents(DEPLOY / "kubernetes/secrets.example.yaml")
    text = next(one["stringData"]["tenants.toml"] for one in secrets if "tenants.toml" in one["stringData"])
    (tmp_path / "tenants.toml").write_text(text)
    read_tenants(tmp_path / "tenants.toml")


# --- systemd


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_are_what_systemd_understands(path, tmp_path):
    analyze = needs("systemd-analyze")
    unit = tmp_path / path.name
    unit.write_text(path.read_text().replace("/opt/hone/bin/hone", shutil.which("true") or "/bin/true"))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    ours = [line for line in done.stderr.splitlines() if path.name in line]
    assert (done.returncode, ours) == (0, [])


def test_a_unit_has_time_to_drain():
    [node] = [path for path in UNITS if "node" in path.name]
    stop = re.search(r"^TimeoutStopSec=(\d+)$", node.read_text(), re.M)
    drain = re.search(r"^HONE_NODE_DRAIN_SECONDS=(\d+)$", environment_of(node).read_text(), re.M)
    assert stop is not None
    assert drain is not None
    assert int(stop[1]) > int(drain[1])


# --- Slurm


def test_the_job_script_is_clean():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    done = subprocess.run([needs("shellcheck"), str(SBATCH)], capture_output=True, text=True, check=False)
    assert done.stdout == ""


@pytest.mark.skipif(not look().has_user_namespaces, reason="no user namespaces")
def test_the_job_script_serves_announces_and_drains(tmp_path):
    """With the real node, and in place of Slurm two commands that do on this machine what it would on each."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (
        ("srun", 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"'),
        ("scontrol", "echo 127.0.0.1"),
        ("hone", f'exec {sys.executable} -m hone.cli.main "$@"'),
    ):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "tokens").write_text("gateway 0123456789abcdef gateway\n")
    job = f"test-{os.getpid()}"
    state = Path(f"/tmp/hone-node-{job}")
    variables = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HONE_FOLDER": str(tmp_path),
        "HONE_PORT": "0",
        "HONE_METRICS_PORT": "0",
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "here",
    }
    process = subprocess.Popen(["bash", str(SBATCH)], env=variables, stdout=subprocess.PIPE, text=True)
    try:
        assert "serves at tcp://0.0.0.0:" in process.stdout.readline()
        assert (tmp_path / "nodes").read_text() == "tcp://127.0.0.1:0\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert not (tmp_path / "nodes").exists()
    finally:
        if process.poll() is None and (state / "pid").exists():
            os.kill(int((state / "pid").read_text()), signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()
        shutil.rmtree(state, ignore_errors=True)


def test_without_tokens_the_job_says_so(tmp_path):
    variables = {**os.environ, "HONE_FOLDER": str(tmp_path), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "here"}
    done = subprocess.run(["bash", str(SBATCH)], env=variables, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (2, f"there is no {tmp_path}/tokens\n")


# --- Prometheus and Grafana


async def names_of_metrics() -> set[str]:
    """Names of samples, with every suffix that one may have."""
    gateway = Gateway([Fixed(parse_address("tcp://127.0.0.1:1"))], "unix:/nowhere")
    found: list[Metric] = [*NodeCollector(Node("n")).collect(), *GatewayCollector(gateway).collect()]
    return {f"{metric.name}{suffix}" for metric in found for suffix in ("", *KNOWN_SUFFIXES)}


async def test_rules_and_panels_name_metrics_that_there_are():
    known = await names_of_metrics()
    rules = (DEPLOY / "prometheus/rules.yaml").read_text()
    recorded = set(re.findall(r"record: (\S+)", rules))
    dashboard = json.loads((DEPLOY / "grafana/sandboxes.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 20
    for text in (rules, *expressions):
        for name in re.findall(r"(?<![\w:])hone_(?:sandbox|gateway)_\w+(?!\w|:)", text):
            assert name in known, f"nobody tells {name}"
        for name in re.findall(r"\binstance(?:_\w+)?:hone_\w+:\w+", text):
            assert name in recorded
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_rules_alert_when_they_should():
    promtool = needs("promtool")
    done = subprocess.run(
        [promtool, "test", "rules", "rules.test.yaml"],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_container_file_copies_what_there_is():
    sources = container_sources()
    assert all((DEPLOY.parent / source).exists() for source in sources)


def test_the_container_file_copies_what_the_wheel_is_built_from():
    settings = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())
    hooks = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]
    wanted = {settings["project"]["readme"], *(hook.get("path", "hatch_build.py") for hook in hooks.values())}
    assert wanted <= container_sources()


def container_sources() -> set[str]:
    lines = re.findall(r"^COPY (?!--from)(.*)$", (DEPLOY / "Containerfile").read_text(), re.M)
    return {source for line in lines for source in line.split()[:-1]}

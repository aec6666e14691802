"""The files of `deploy/` use paths, options, extras and variables that the package has."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from typer.testing import CliRunner

from mistral_rerank.cli import app
from mistral_rerank.reranker import Reranker
from mistral_rerank.server.app import create_app
from mistral_rerank.server.lifecycle import DRAIN_SECONDS
from mistral_rerank.server.settings import ServerSettings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def load(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def of_kind(kind):
    (document,) = [document for document in load("kubernetes.yaml") if document["kind"] == kind]
    return document


@pytest.fixture(scope="module")
def dockerfile():
    """The instructions, continued lines joined: (name, rest)."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [tuple(line.split(maxsplit=1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def arguments_of(dockerfile, name):
    return [rest for instruction, rest in dockerfile if instruction == name]


@pytest.fixture(scope="module")
def container():
    (only,) = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    return only


@pytest.fixture
def command(dockerfile):
    return json.loads(arguments_of(dockerfile, "CMD")[0])


def test_the_server_has_the_probed_paths(length_reranker: Reranker, dockerfile, container):
    (check,) = arguments_of(dockerfile, "HEALTHCHECK")
    ((job,),) = [document["scrape_configs"] for document in load("prometheus.yml")]
    (monitor, _) = load("kubernetes-monitoring.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    probes = [container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")]
    asked_for = {urlsplit(url).path for url in re.findall(r"http://[^' ]+", check)}
    asked_for |= {*probes, job["metrics_path"], endpoint["path"]}
    assert len(asked_for) == 3
    assert asked_for <= set(create_app(length_reranker, ServerSettings()).openapi()["paths"])


def test_the_command_line_accepts_the_commands(dockerfile, command, container):
    (compose,) = load("compose.yaml")
    help_text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert json.loads(arguments_of(dockerfile, "ENTRYPOINT")[0]) == ["mistral-rerank"]
    for words in (command, compose["services"]["server"]["command"], container["args"]):
        assert words[0] == "serve"
        assert all(word in help_text for word in words if word.startswith("--"))
        assert "--model" not in words  # an option would outdo MISTRAL_RERANK_MODEL
    assert any("mistral-rerank pull mini" in rest for rest in arguments_of(dockerfile, "RUN"))


def test_the_image_installs_what_the_extras_need_at_pinned_versions_from_files_that_exist(dockerfile):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    needed = {Requirement(text) for text in [*project["project"]["dependencies"], *extras["local"], *extras["serve"]]}
    lock = (DEPLOY / "requirements.lock").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([\w.-]+)==(\S+) \\$", lock, flags=re.MULTILINE))
    for requirement in [each for each in needed if each.name != "torch"]:
        assert locked[requirement.name] in requirement.specifier, requirement
    assert lock.count("--hash=sha256:") >= len(locked)
    assert "torch" not in locked
    (torch,) = [rest.split("=", 1)[1] for rest in arguments_of(dockerfile, "ARG") if rest.startswith("TORCH=")]
    assert Requirement(torch).name == "torch"
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [word for rest in arguments_of(dockerfile, "COPY") for word in shlex.split(rest)[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {f"!{name}" for name in copied} == {line for line in ignored if line.startswith("!")}
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {package.split("/")[0] for package in packages} <= set(copied)


def test_stopping_leaves_time_to_drain():
    (compose,) = load("compose.yaml")
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before + DRAIN_SECONDS
    assert int(compose["services"]["server"]["stop_grace_period"].removesuffix("s")) > DRAIN_SECONDS


def test_the_manifest_mounts_keys_so_that_a_rotation_needs_no_rollout(container):
    (keys,) = [mount for mount in container["volumeMounts"] if mount["name"] == "keys"]
    assert "subPath" not in keys
    arguments = container["args"]
    assert arguments[arguments.index("--api-key-file") + 1] == f"{keys['mountPath']}/keys"
    (volume,) = [
        each for each in of_kind("Deployment")["spec"]["template"]["spec"]["volumes"] if each["name"] == "keys"
    ]
    assert volume["secret"]["secretName"] == "mistral-rerank-keys"


def test_the_autoscaler_uses_a_metric_that_the_server_has(length_reranker: Reranker):
    (_, autoscaler) = load("kubernetes-monitoring.yaml")
    (metric,) = autoscaler["spec"]["metrics"]
    text = create_app(length_reranker, ServerSettings()).state.service.metrics.text().decode()
    assert f"\n{metric['pods']['metric']['name']} " in text


def test_the_ray_file_has_valid_cluster_settings():
    pytest.importorskip("ray", reason="ray is not installed: pip install 'mistral-rerank[cluster]'")
    from mistral_rerank.server import cluster

    (serve_file,) = load("ray-serve.yaml")
    (application,) = serve_file["applications"]
    module, name = application["import_path"].split(":")
    assert (module, getattr(cluster, name)) == (cluster.__name__, cluster.application)
    chosen = cluster.Arguments.model_validate(application["args"])
    assert (chosen.cluster.min_replicas, chosen.cluster.gpus) == (2, 1)

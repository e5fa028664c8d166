"""The files of configs/deploy: that they name what there is, and that a container's steps lead to a server."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx2
import pytest
import yaml
from t2i.pipelines.serving.gateway.access import read_keys
from typer.main import get_command
from typer.testing import CliRunner

from t2i.cli import app
from tests.serving.dockerfiles import Stage, build_stages, read_dockerfile

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs/deploy"
STEPS = list(read_dockerfile(FOLDER / "Dockerfile"))
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
OBJECTS = {item["kind"]: item for item in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())}
POD = OBJECTS["Deployment"]["spec"]["template"]
[CONTAINER] = POD["spec"]["containers"]
KEY = "0123456789abcdef"
# The root of the base image: the packages of Debian that no system does without
DEBIAN = ["mmdebstrap", "--variant=minbase", "--components=main", "bookworm"]


def find_step(name: str):
    """Return the last instruction of a name."""
    return [step for step in STEPS if step.name == name][-1]


ENTRY = find_step("ENTRYPOINT").words
COMMANDS = {
    "Dockerfile": ENTRY + find_step("CMD").words,
    "compose": ENTRY + COMPOSE["services"]["t2i"]["command"],
    "kubernetes": ENTRY + CONTAINER["args"],
}


def parse(words: list[str]) -> dict:
    """Return the options of a `t2i serve` command line."""
    [program, name, *rest] = words
    assert program == "t2i"
    return get_command(app).commands[name].make_context("serve", rest).params


@pytest.mark.parametrize("where", COMMANDS)
def test_the_server_is_started_by_options_that_it_has_and_only_for_clients_with_keys(where):
    options = parse(COMMANDS[where])
    assert options["host"] == "0.0.0.0" and str(options["keys"]).startswith("/run/secrets/")


@pytest.mark.parametrize("where", COMMANDS)
def test_the_commands_start_a_server_for_other_machines(where, tmp_path, monkeypatch):
    keys, started = tmp_path / "keys", []
    keys.write_text(f"me: {KEY}")
    keys.chmod(0o600)
    monkeypatch.setattr("t2i.pipelines.serving.server.serve", lambda source, settings: started.append(settings))
    words = [str(keys) if word.startswith("/run/secrets/") else word for word in COMMANDS[where][1:]]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0 and started[0].host == "0.0.0.0" and started[0].build_access().keys is not None


def test_all_files_name_one_port():
    port = parse(COMMANDS["Dockerfile"])["port"]
    assert find_step("EXPOSE").value == str(port)
    assert f":{port}/health" in find_step("HEALTHCHECK").value
    assert COMPOSE["services"]["t2i"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": port}]
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(port)
    assert f"127.0.0.1:{port}" in (FOLDER / "prometheus.yaml").read_text()


def test_probes_and_scrapes_ask_for_routes_that_there_are():
    source = (ROOT / "pipelines/serving/app.py").read_text()
    asked = {CONTAINER[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    asked |= {POD["metadata"]["annotations"]["prometheus.io/path"], "/health"}
    assert asked == {"/ready", "/health", "/metrics"}
    assert all(f'Route("{path}"' in source for path in asked)


def test_requests_have_their_time_to_end_before_a_container_is_killed():
    drain = parse(COMMANDS["kubernetes"])["drain"]
    waits = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["spec"]["terminationGracePeriodSeconds"] >= waits + drain + 5
    assert int(COMPOSE["services"]["t2i"]["stop_grace_period"].rstrip("s")) >= parse(COMMANDS["compose"])["drain"] + 5
    assert find_step("STOPSIGNAL").value == "SIGTERM"


def test_a_container_computes_with_the_cores_that_it_has():
    limits = COMPOSE["services"]["t2i"]["deploy"]["resources"]["limits"]
    assert COMPOSE["services"]["t2i"]["environment"]["OMP_NUM_THREADS"] == limits["cpus"]
    [threads] = [variable for variable in CONTAINER["env"] if variable["name"] == "OMP_NUM_THREADS"]
    assert threads["valueFrom"]["resourceFieldRef"]["resource"] == "requests.cpu"


def test_keys_are_where_the_server_reads_them_and_closed_to_others(tmp_path):
    [volume] = [volume for volume in POD["spec"]["volumes"] if volume["name"] == "keys"]
    [mount] = [mount for mount in CONTAINER["volumeMounts"] if mount["name"] == "keys"]
    assert str(parse(COMMANDS["kubernetes"])["keys"]) == f"{mount['mountPath']}/keys"
    assert POD["spec"]["securityContext"]["fsGroup"] == POD["spec"]["securityContext"]["runAsGroup"]
    assert str(parse(COMMANDS["compose"])["keys"]) == f"/run/secrets/{COMPOSE['services']['t2i']['secrets'][0]}"
    path = tmp_path / "keys"
    path.write_text(f"me: {KEY}")
    path.chmod(volume["secret"]["defaultMode"])
    assert read_keys(path).find_name(KEY) == "me"


def test_the_container_runs_as_one_user_who_is_not_root():
    assert find_step("USER").value == str(POD["spec"]["securityContext"]["runAsUser"]) != "0"


def test_clients_behind_one_proxy_reach_all_pods():
    # By the address of the client, which is the proxy's, one pod would serve them all
    assert OBJECTS["Service"]["spec"].get("sessionAffinity", "None") == "None"


def test_the_autoscaler_reads_a_metric_of_the_server():
    [metric] = OBJECTS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f'"{name}"' in (ROOT / "pipelines/serving/gateway/metrics.py").read_text()
    assert f"seriesQuery: '{name}{{" in (FOLDER / "prometheus.yaml").read_text()


@pytest.mark.parametrize(
    "path", ["docs/how-to/plan-capacity.md", "docs/how-to/deploy.md", "configs/deploy/prometheus.yaml"]
)
def test_metrics_that_are_named_are_those_of_the_server(path):
    named = set(
        re.findall(r"\bt2i_(?:queue|running|pictures|rejected|requests?|cancelled)\w*", (ROOT / path).read_text())
    )
    source = (ROOT / "pipelines/serving/gateway/metrics.py").read_text()
    # Counters have names without their ending
    assert [name for name in named if f'"{name.removesuffix("_total")}"' not in source] == []


def test_labels_and_names_lead_to_the_pods():
    labels = POD["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert OBJECTS[kind]["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["Service"]["spec"]["selector"] == labels
    assert (
        OBJECTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        == OBJECTS["Deployment"]["metadata"]["name"]
    )


def test_the_image_has_every_folder_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {word.strip("/") for step in STEPS if step.name == "COPY" for word in step.value.split()[:-1]}
    assert set(project["tool"]["setuptools"]["package-dir"].values()) <= copied
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= copied
    assert copied - {"opt/t2i"} == {path.split("/")[0] for path in list_context()}


def list_context() -> list[str]:
    """Return the paths that the file beside the Dockerfile lets in."""
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    return [line[1:] for line in lines if line.startswith("!")]


def test_the_dockerfile_has_no_remarks_of_its_linter():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    subprocess.run([hadolint, FOLDER / "Dockerfile"], check=True)


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_have_the_form_that_kubernetes_wants(kind):
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validator.validate(OBJECTS[kind], "1.34", strict=True)


def download_build_tools(folder: Path) -> None:
    """Download what builds the package, for a root without an index."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, *wanted], check=True)


def list_package_folders() -> list[Path]:
    """Return the folders of this machine's installed packages."""
    return [Path(path) for path in sys.path if path.endswith("-packages")]


def copy_context(folder: Path) -> None:
    """Copy the files of the repository that the file beside the Dockerfile lets in."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *list_context()]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def wait_until_healthy(stage: Stage, server: subprocess.Popen, port: str) -> None:
    """Run the health check until it succeeds."""
    words = [word.replace("8000", port) for word in json.loads(find_step("HEALTHCHECK").value.removeprefix("CMD "))]
    end = time.monotonic() + 300
    while subprocess.run(stage.build_command(words), capture_output=True).returncode:
        assert server.poll() is None and time.monotonic() < end
        time.sleep(1)


@pytest.mark.deploy
def test_the_steps_of_the_dockerfile_lead_to_a_server_that_draws(tmp_path):
    if os.geteuid() or shutil.which("mmdebstrap") is None or sys.version_info[:2] != (3, 11):
        pytest.skip("this needs root rights, mmdebstrap, and Debian's Python 3.11 here too")
    subprocess.run([*DEBIAN, tmp_path / "base.tar"], check=True)
    download_build_tools(tmp_path / "tools")
    copy_context(tmp_path / "context")
    # This machine's packages are there, so that pip checks their versions and downloads none
    mounts = {path: f"/packages/{number}" for number, path in enumerate(list_package_folders())}
    variables = {"PYTHONPATH": ":".join(mounts.values()), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/tools"}
    mounts[tmp_path / "tools"] = "/tools"
    stage = build_stages(
        FOLDER / "Dockerfile", tmp_path / "context", tmp_path / "base.tar", tmp_path / "roots", variables, mounts
    )
    keys = stage.root / "run/secrets/keys"
    keys.parent.mkdir()
    keys.write_text(f"me: {KEY}")
    keys.chmod(0o600)
    os.chown(keys, int(stage.user), int(stage.user))

    # On another port, for the network is this machine's
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = stage.build_command([word.replace("8000", port) for word in COMMANDS["Dockerfile"]], mounts, True)
    server = subprocess.Popen(command)
    try:
        wait_until_healthy(stage, server, port)
        url, body = f"http://127.0.0.1:{port}/v1/images/generations", {"prompt": "a cat", "steps": 2}
        assert httpx2.post(url, json=body).status_code == 401
        answer = httpx2.post(url, json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=120)
        assert answer.status_code == 200 and answer.json()["model"] == "emoji"
        # The first process of the container gets the signal
        [first] = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        os.kill(int(first), getattr(signal, find_step("STOPSIGNAL").value))
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(tmp_path / "roots")

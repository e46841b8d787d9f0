"""What the compose files and Dockerfiles promise, read from them; Docker checks their form where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest

from tests.support.composed import COMPOSE, ROOT, read
from workers.config import load_job
from workers.launch.environment import MALLOC_TUNABLES

BASE = read("compose.yaml")
SERVICES: dict[str, Any] = BASE["services"]
SHARDS = ("shard-0", "shard-1")
STANDBYS = ("standby-0", "standby-1")
ROLES = ("coordinator", *SHARDS, *STANDBYS, "worker")
ONCE = ("certs", "prepare", "grafana-password", "tools")
OVERLAYS = ([], ["insecure"], ["gpu"], ["test"], ["text"], ["insecure", "test"], ["insecure", "gpu", "text"])

_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> int:
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([smh])", text))


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].partition(":")[0]) > 0
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & set(service)
    assert service.get("network_mode", "none") == "none"
    assert service["deploy"]["resources"]["limits"].keys() == {"memory", "pids"}
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert seconds(service["stop_grace_period"]) > 0
    if name in ONCE:
        assert (service["healthcheck"], service["restart"]) == ({"disable": True}, "no")
    else:
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["restart"] == ("on-failure" if name in ROLES else "unless-stopped")


def test_only_the_pages_for_people_are_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published.keys() == {"prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert BASE["networks"]["cluster"] == {"internal": True}
    assert all(SERVICES[name]["networks"] == ["cluster"] for name in ROLES)


def test_a_role_sees_its_own_key_and_no_other() -> None:
    for name in ROLES:
        # A standby is a shard of which there is one already.
        role = name.partition("-")[0].replace("standby", "shard")
        keys = [volume for volume in SERVICES[name]["volumes"] if volume.startswith("certs")]
        assert keys == [f"certs-{role}:/certs/{role}:ro"]
        assert SERVICES[name]["environment"]["WINDLASS_CERTIFICATES"] == f"/certs/{role}"
        assert "WINDLASS_INSECURE" not in SERVICES[name]["environment"]
    holders = [name for name, service in SERVICES.items() if any("certs-ca" in v for v in service.get("volumes", ()))]
    assert holders == ["certs"]


def test_encryption_is_turned_off_in_so_many_words() -> None:
    services = read("insecure.yaml")["services"]
    assert services.pop("certs") is None
    assert services.keys() == {*ROLES, "tools"}
    for service in services.values():
        assert service["environment"] == {"WINDLASS_CERTIFICATES": None, "WINDLASS_INSECURE": "true"}
        assert not any("certs" in volume for volume in service["volumes"])
        assert "certs" not in service.get("depends_on", ())
    for name in ROLES:
        kept = [volume for volume in SERVICES[name]["volumes"] if "certs" not in volume]
        assert services[name]["volumes"] == kept
        waits = {other: how for other, how in SERVICES[name]["depends_on"].items() if other != "certs"}
        assert services[name]["depends_on"] == waits


def test_the_default_job_fits_the_services() -> None:
    job = load_job(COMPOSE / "job.yaml", SERVICES["coordinator"]["command"][1:])
    assert job.cluster.shards == len(SHARDS)
    assert str(job.cluster.workers) == re.findall(r":-(\d+)", SERVICES["worker"]["deploy"]["replicas"])[0]
    # More workers may be of use than there are at the start.
    assert job.contributions > job.cluster.workers
    for name in ("coordinator", *SHARDS, *STANDBYS):
        assert seconds(SERVICES[name]["stop_grace_period"]) > job.checkpoint.timeout_s
        assert "runs:/runs" in SERVICES[name]["volumes"]
    assert f"data:{job.data.cache_dir}" in SERVICES["worker"]["volumes"]
    assert SERVICES["prepare"]["command"][1] in SERVICES["coordinator"]["command"]
    assert all(SERVICES[name]["environment"]["WINDLASS_METRICS_LISTEN"].endswith(":9400") for name in ROLES)


def test_standbys_are_second_processes_of_the_shards_and_only_there_when_asked_for() -> None:
    for name, shard in zip(STANDBYS, SHARDS, strict=True):
        differs = {"hostname": name, "profiles": ["standbys"]}
        assert SERVICES[name] == {**SERVICES[shard], **differs}


def test_every_volume_is_declared_and_used() -> None:
    used = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())}
    assert {name for name in used if not name.startswith("./")} == BASE["volumes"].keys()


@pytest.mark.parametrize("name", ["Dockerfile.ps", "Dockerfile.worker", "Dockerfile.prometheus"])
def test_dockerfiles_keep_the_usual_rules(name: str) -> None:
    text = (COMPOSE / name).read_text()
    lines = text.replace("\\\n", " ").splitlines()
    instructions = [line for line in lines if line and not line.startswith(("#", " "))]
    users = [line.split()[1] for line in instructions if line.startswith("USER ")]
    assert len(users) == 1
    assert int(users[0].partition(":")[0]) > 0
    assert not [line for line in instructions if line.startswith(("ADD ", "MAINTAINER ")) or ":latest" in line]
    assert all(line.split()[1].startswith("/") for line in instructions if line.startswith("WORKDIR "))
    assert all(
        line.partition(" ")[2].startswith("[") for line in instructions if line.startswith(("ENTRYPOINT", "CMD"))
    )
    for line in (line for line in instructions if line.startswith("RUN ")):
        assert "sudo" not in line
        assert "pip" not in line or "install" not in line or "--no-cache-dir" in line
        if "apt-get install" in line:
            assert "--no-install-recommends" in line
            assert "rm -rf /var/lib/apt/lists" in line
    if name != "Dockerfile.prometheus":
        assert sum(line.startswith("FROM ") for line in instructions) == 2
        # With them a role need not start itself again.
        assert f"GLIBC_TUNABLES={MALLOC_TUNABLES} " in text.replace("\\", "")
        assert "HEALTHCHECK" in text


def test_the_server_has_no_torch() -> None:
    server = (COMPOSE / "Dockerfile.ps").read_text()
    assert "optional-dependencies" not in server
    assert "TORCH" not in server


def test_what_is_sent_to_the_builder_is_named() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    copied = {word for name in ("Dockerfile.ps", "Dockerfile.worker") for word in _copied(name)}
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


def _copied(name: str) -> list[str]:
    lines = (COMPOSE / name).read_text().splitlines()
    return [word for line in lines if re.match(r"COPY (?!--)", line) for word in line.split()[1:-1]]


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs the docker command with Compose")
@pytest.mark.parametrize("overlays", OVERLAYS, ids="+".join)
def test_compose_takes_the_files(overlays: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_TEXT", "/books")
    files = [word for name in ("compose", *overlays) for word in ("--file", str(COMPOSE / f"{name}.yaml"))]
    command = ["docker", "compose", *files, "config", "--format", "json"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "is not a docker command" in found.stderr or "unknown flag" in found.stderr:
        pytest.skip("this docker has no Compose")
    assert found.returncode == 0, found.stderr
    services = json.loads(found.stdout)["services"]
    assert set(ROLES) <= services.keys()
    assert ("certs" in services) == ("insecure" not in overlays)
    assert ("grafana" in services) == ("test" not in overlays)
    if "insecure" in overlays:
        assert not [name for name in ROLES if "WINDLASS_CERTIFICATES" in services[name]["environment"]]
    if "text" in overlays:
        assert all(services[name]["command"][-1] == "data.paths=[/text]" for name in ("prepare", "coordinator"))
        mounted = [volume["target"] for volume in services["worker"]["volumes"] if volume["source"] == "/books"]
        assert mounted == ["/text"]
        assert set(SERVICES["coordinator"]["command"]) <= {
            word.replace("default", "${WINDLASS_RUN:-default}") for word in services["coordinator"]["command"]
        }
    if "gpu" in overlays:
        assert services["worker"]["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"

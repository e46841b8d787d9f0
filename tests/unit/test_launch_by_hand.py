"""The commands that are printed for people, the job's environment, and the health question."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from ps.errors import ConfigError, PeerUnavailable, StartupError
from ps.types import Role
from ps.wire import probe
from ps.wire.health import Health
from ps.wire.options import bind, make_server, reachable
from ps.wire.security import load_security
from workers.cli.main import main
from workers.launch import jobs
from workers.launch.by_hand import role_commands

JOB = ["run_dir=runs/a b", "cluster.workers=3"]


def words(*overrides: str, first_port: int | None = None) -> list[list[str]]:
    arguments = [*JOB, *overrides]
    return [shlex.split(line)[4:] for line in role_commands(jobs.resolve(None, arguments), arguments, first_port)]


def test_every_role_has_a_command_with_ports_of_its_own() -> None:
    coordinator, *others = words()
    assert coordinator[:3] == ["coordinator", *JOB]
    assert [command[0] for command in others] == ["shard"] * 2 + ["worker"] * 3
    assert [command[command.index("--index") + 1] for command in others[:2]] == ["0", "1"]
    address = coordinator[coordinator.index("--listen") + 1]
    assert {command[command.index("--coordinator") + 1] for command in others} == {address}
    flags = ("--listen", "--metrics-listen")
    listeners = [command[command.index(flag) + 1] for command in (coordinator, *others) for flag in flags]
    assert len(set(listeners)) == 12
    assert not any(listener.endswith(":0") for listener in listeners)


def test_ports_may_be_named() -> None:
    commands = words("telemetry.metrics=false", "launch.host=10.9.8.7", first_port=7000)
    assert [command[command.index("--listen") + 1] for command in commands] == [
        f"10.9.8.7:{7000 + i}" for i in range(6)
    ]
    assert all("--metrics-listen" not in command for command in commands)
    with pytest.raises(ConfigError, match=r"^--first-port=65530: this cluster has 12 listeners.* at most 65524$"):
        words(first_port=65_530)


def test_who_listens_everywhere_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "machine")
    commands = words("launch.host=0.0.0.0", first_port=7000)
    assert commands[0][commands[0].index("--listen") + 1] == "0.0.0.0:7000"
    assert commands[1][:3] == ["shard", "--coordinator", "machine:7000"]
    assert reachable("0.0.0.0:1") == "machine"
    assert reachable("0.0.0.0:1", "10.0.0.5") == reachable("127.0.0.1:1", "10.0.0.5") == "10.0.0.5"


def test_the_others_get_the_certificates_that_the_coordinator_finds_in_its_job() -> None:
    coordinator, *others = words("security.certificates=/certs", "security.insecure=true")
    assert "security.certificates=/certs" in coordinator
    assert all(command[3:6] == ["--certificates", "/certs", "--insecure"] for command in others)


def test_an_address_of_another_host_has_no_free_ports_here() -> None:
    with pytest.raises(StartupError, match=r"^launch.host=192.0.2.1: .*--first-port"):
        words("launch.host=192.0.2.1")


def test_printing_starts_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--print-commands", "cluster.shards=1", "cluster.workers=1"]) == 0
    out, err = capsys.readouterr()
    lines = [shlex.split(line) for line in out.splitlines()]
    assert [line[:4] for line in lines] == [[sys.executable, "-P", "-m", "workers.cli.main"]] * 3
    # The default's name is that of the moment: all have to mean the same one.
    assert any(word.startswith(f"run_dir={tmp_path}/runs/") for word in lines[0])
    assert (err, list(tmp_path.iterdir())) == ("", [])
    assert main(["train", "--first-port", "7000"]) == 2
    assert "--print-commands" in capsys.readouterr().err


def test_the_job_may_come_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("seed: 7\n")
    environment = {"WINDLASS_JOB": str(file), "WINDLASS_OVERRIDES": "seed=8 \"data.paths=['a b']\""}
    assert jobs.given([], {}) == (None, [])
    found = jobs.given(["seed=9"], environment)
    assert found == (file, ["seed=8", "data.paths=['a b']", "seed=9"])
    assert jobs.resolve(*found).seed == 9
    # What is named on the command line is meant.
    assert jobs.given(["other.yaml"], environment)[0] == Path("other.yaml")
    with pytest.raises(ConfigError, match=r"^WINDLASS_OVERRIDES=seed='8: .*quot"):
        jobs.given([], {"WINDLASS_OVERRIDES": "seed='8"})


@pytest.mark.parametrize("host", ["", "a:1", "http://a"])
def test_what_is_advertised_is_a_host(capsys: pytest.CaptureFixture[str], host: str) -> None:
    assert main(["shard", "--coordinator", "a:1", "--index", "0", "--advertise", host]) == 2
    assert f"--advertise={host}" in capsys.readouterr().err


def test_health_is_asked_over_grpc(capsys: pytest.CaptureFixture[str]) -> None:
    server = make_server(4)
    health = Health(server, "x")
    environment = {"WINDLASS_LISTEN": f"0.0.0.0:{bind(server, '127.0.0.1:0')}"}
    server.start()
    try:
        address = probe.own_address(environment)
        assert address.startswith("127.0.0.1:")
        assert probe.main([], environment) == 1
        assert f"{address} says NOT_SERVING" in capsys.readouterr().err
        health.serving()
        assert probe.main([], environment) == probe.main([address], {}) == 0
        assert main(["health", address]) == 0
        assert "serves" in capsys.readouterr().out
    finally:
        server.stop(None).wait(5.0)
    with pytest.raises(PeerUnavailable, match=f"asking {address} for its health"):
        probe.check(address)


def test_health_is_asked_with_certificates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for folder in ("certs", "others"):
        assert main(["certs", "init", str(tmp_path / folder)]) == 0
    certs = tmp_path / "certs"
    server = make_server(4)
    Health(server, "x").serving()
    port = bind(server, "127.0.0.1:0", load_security(certs, False, Role.WORKER))
    server.start()
    environment = {"WINDLASS_LISTEN": f"0.0.0.0:{port}"}
    try:
        # Its own, another role's and people's; but not somebody else's, nor none.
        for mine in (certs / "worker", certs / "shard", certs):
            assert probe.main([], {**environment, "WINDLASS_CERTIFICATES": str(mine)}) == 0
        assert main(["health", f"127.0.0.1:{port}", "--certificates", str(certs / "client")]) == 0
        for wrong in ({}, {"WINDLASS_CERTIFICATES": str(tmp_path / "others")}):
            assert probe.main([], {**environment, **wrong}) == 1
        capsys.readouterr()
        assert probe.main([], {**environment, "WINDLASS_CERTIFICATES": str(tmp_path)}) == 1
        assert "windlass certs init" in capsys.readouterr().err
    finally:
        server.stop(None).wait(5.0)


@pytest.mark.parametrize("listen", ["", "0.0.0.0:0", "somewhere"])
def test_a_probe_needs_a_port_that_is_known(listen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main([], {"WINDLASS_LISTEN": listen}) == 1
    assert f"WINDLASS_LISTEN={listen}: no fixed HOST:PORT" in capsys.readouterr().err

"""`windlass certs`: what it makes, what it refuses to overwrite, and what it finds wrong."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ps.wire import authority
from ps.wire.security import ROLES, load_security
from tests.support.certificates import let_expire, make
from workers.cli.main import main

FILES = ("ca.pem", "cert.pem", "key.pem")


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    made = make(tmp_path / "certs")
    capsys.readouterr()
    return made


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["certs", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert err.count("\n") <= 1
    return code, out, err


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_everybody_gets_a_certificate_and_keys_are_private(tmp_path: Path) -> None:
    assert main(["certs", "init", str(tmp_path / "new" / "certs")]) == 0
    found = contents(tmp_path / "new" / "certs")
    assert set(found) == {Path("ca/ca.pem"), Path("ca/ca.key"), *(Path(r, name) for r in ROLES for name in FILES)}
    for path in found:
        mode = stat.S_IMODE((tmp_path / "new" / "certs" / path).stat().st_mode)
        assert mode == (0o600 if "key" in path.name else 0o666), path
    assert {found[Path(role, "ca.pem")] for role in ROLES} == {found[Path("ca/ca.pem")]}


def test_what_is_there_is_replaced_only_when_asked_for(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    before = contents(folder)
    code, _, err = run(capsys, "init", folder)
    assert code == 2
    for word in (str(folder), "--if-missing", "--force"):
        assert word in err
    assert run(capsys, "init", folder, "--if-missing")[0] == 0
    assert contents(folder) == before
    assert run(capsys, "init", folder, "--force")[0] == 0
    after = contents(folder)
    assert set(after) == set(before)
    assert not set(after.values()) & set(before.values())
    assert run(capsys, "show", folder)[0] == 0


def test_only_what_is_missing_is_made(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    before = contents(folder)
    (folder / "worker" / "cert.pem").unlink()
    code, out, _ = run(capsys, "init", folder, "--if-missing")
    assert code == 0
    assert "made certificates of worker\n" in out
    changed = {path for path, data in contents(folder).items() if before[path] != data}
    assert changed == {Path("worker/cert.pem"), Path("worker/key.pem")}
    assert run(capsys, "show", folder)[0] == 0


def test_a_ca_key_that_was_taken_away_is_missed_only_when_it_is_needed(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "ca" / "ca.key").unlink()
    before = contents(folder)
    assert run(capsys, "init", folder, "--if-missing")[0] == 0
    (folder / "shard" / "cert.pem").unlink()
    for arguments in (["init", folder, "--if-missing"], ["issue", folder, "shard"]):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert "ca.key cannot be read" in err
    assert {path for path in before if path not in contents(folder)} == {Path("shard/cert.pem")}


def test_one_more_certificate(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    assert run(capsys, "issue", folder, "worker", "--name", "gpu3", "--days", "9")[0] == 0
    assert run(capsys, "issue", folder, "worker", "--out", tmp_path / "elsewhere")[0] == 0
    code, out, _ = run(capsys, "show", folder)
    assert code == 0
    rows = {line.split()[1]: line.split() for line in out.splitlines()}
    assert rows["CN=gpu3"][0] == "worker"
    assert rows["CN=gpu3"][4] == "8"
    assert run(capsys, "show", tmp_path / "elsewhere")[0] == 0
    # A new one in the place of the old one.
    before = contents(folder)
    assert run(capsys, "issue", folder, "coordinator")[0] == 0
    changed = {path for path, data in contents(folder).items() if before[path] != data}
    assert changed == {Path("coordinator/cert.pem"), Path("coordinator/key.pem")}


def test_no_certificate_outlives_its_ca() -> None:
    now = datetime.now(UTC)
    ca = authority.make_authority(now)
    end = authority.examine(ca.certificate, ca.certificate).not_after
    for days, left in ((3649, 3649), (3700, 3650)):
        issued = authority.issue(ca, "worker", "late", now, days).certificate
        facts = authority.examine(issued, ca.certificate)
        assert facts.not_after == min(end, facts.not_before + timedelta(days=days) + authority.CLOCK_SKEW)
        assert (facts.not_after - facts.not_before - authority.CLOCK_SKEW).days == left


def test_an_expired_certificate_is_seen(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    let_expire(folder, "shard")
    for where in (folder, folder / "shard"):
        code, out, _ = run(capsys, "show", where)
        assert code == 1
        line = next(line for line in out.splitlines() if line.startswith("shard"))
        assert line.split()[4] == "-3"
        assert line.endswith("shard/cert.pem: expired")
        assert out.count(": expired\n") == 1


def test_a_certificate_of_another_ca_is_seen(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other")
    capsys.readouterr()
    (folder / "worker" / "cert.pem").write_bytes((other / "worker" / "cert.pem").read_bytes())
    code, out, _ = run(capsys, "show", folder)
    assert code == 1
    assert f"worker/cert.pem: not signed by {folder / 'ca' / 'ca.pem'}\n" in out
    assert out.count("not signed") == 1


def test_what_is_no_certificate_is_named(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    code, _, err = run(capsys, "show", tmp_path)
    assert code == 2
    assert f"{tmp_path} holds no certificates" in err
    (folder / "client" / "cert.pem").write_text("nothing")
    code, out, err = run(capsys, "show", folder)
    assert (code, out) == (2, "")
    assert str(folder / "client" / "cert.pem") in err
    for name, text in (("ca.key", "nothing"), ("ca.key", (folder / "worker" / "key.pem").read_text())):
        (folder / "ca" / name).write_text(text)
        code, _, err = run(capsys, "issue", folder, "worker")
        assert code == 2
        assert f"{folder / 'ca'} cannot issue a certificate of worker: the CA's key" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["king"], ["ROLE=king", "coordinator, shard, worker, client"]),
        (["worker", "--name", "../x"], ["--name=../x"]),
        (["worker", "--name", "x" * 65], ["x" * 65, "65 characters", "1 to 64"]),
        (["worker", "--days", "0"], ["--days", "1"]),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], folder: Path, arguments: list[str], words: list[str]) -> None:
    before = contents(folder)
    code, _, err = run(capsys, "issue", folder, *arguments)
    assert code == 2
    for word in words:
        assert word in err
    assert contents(folder) == before


def test_half_a_certificate_is_missing(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """A crash may leave it, and nobody else would ever mend it."""
    (folder / "worker" / "ca.pem").unlink()
    (folder / "shard" / "key.pem").write_bytes((folder / "client" / "key.pem").read_bytes())
    code, out, _ = run(capsys, "init", folder, "--if-missing")
    assert code == 0
    assert "shard, worker" in out
    for role in ("shard", "worker", "client", "coordinator"):
        assert load_security(folder, insecure=False, role=role).certificates is not None

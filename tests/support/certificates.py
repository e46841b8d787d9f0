"""Certificates for tests: folders as `windlass certs` makes them, good ones and bad ones."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from ps.wire import authority
from ps.wire.security import CERTIFICATE_FILE, KEY_FILE, ROLES, Certificates, Security
from workers.cli import certs


def make(folder: Path) -> Path:
    """A CA and a certificate for each role."""
    certs.init(folder)
    return folder


def shown_by(folder: Path, role: str) -> Security:
    """A role's certificates, unchecked: what a process that is up to no good would show."""
    assert role in ROLES
    files = (folder / role / name for name in ("ca.pem", "cert.pem", "key.pem"))
    return Security(Certificates(*(file.read_bytes() for file in files)))


def let_expire(folder: Path, role: str) -> None:
    """Put a certificate that has expired in the place of a role's."""
    pair = authority.Pair((folder / "ca/ca.pem").read_bytes(), (folder / "ca/ca.key").read_bytes())
    expired = authority.issue(pair, role, role, datetime.now(UTC) - timedelta(days=3), days=1)
    (folder / role / CERTIFICATE_FILE).write_bytes(expired.certificate)
    (folder / role / KEY_FILE).write_bytes(expired.key)

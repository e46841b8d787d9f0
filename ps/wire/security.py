"""What protects a process's connections: a role's certificate under a private CA, or nothing at all.

Identity is a role, never a host name, so that machines may come and go under any address: every
certificate names `<role>.windlass`, and a client asks for the role that it means to call. Imports no
grpc: the command line looks at certificates before it starts anything.
"""

from __future__ import annotations

import ipaddress
import logging
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ps.errors import StartupError
from ps.types import Role

log = logging.getLogger(__name__)

#: The role of people and their tools: it may ask, and change nothing.
CLIENT = "client"
#: The roles of processes that have certificates: a standby is a shard until it is needed, and shows a shard's.
PROCESSES = (Role.COORDINATOR, Role.SHARD, Role.WORKER)
ROLES = (*map(str, PROCESSES), CLIENT)
#: The files of a certificate's folder.
CA_FILE, CERTIFICATE_FILE, KEY_FILE = "ca.pem", "cert.pem", "key.pem"
#: A certificate that ends sooner is worth a warning at every start.
WARN_DAYS = 30
_ROLE_URI = "windlass://role/"
_DAY_S = 86_400


@dataclass(frozen=True)
class Certificates:
    """One role's certificate and its key, and the CA that it believes; all PEM."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Security:
    """How a process's connections are protected."""

    #: None: they are not.
    certificates: Certificates | None = None
    #: Whether it may serve other hosts without certificates.
    insecure: bool = False


PLAIN = Security()


def name_of(role: str) -> str:
    """The DNS name in a role's certificates, which a client expects of whom it calls."""
    return f"{role}.windlass"


def uri_of(role: str) -> str:
    """The URI in a role's certificates, by which a server knows who calls."""
    return f"{_ROLE_URI}{role}"


def role_of(names: list[str]) -> str | None:
    """The role that a certificate's alternative names give it; None: not exactly one."""
    roles = {name.removeprefix(_ROLE_URI) for name in names if name.startswith(_ROLE_URI)}
    return roles.pop() if len(roles) == 1 else None


def load_security(folder: Path | None, insecure: bool, role: str) -> Security:
    """Read a role's certificate, and see that it can be used.

    Args:
        folder: holds cert.pem, key.pem and ca.pem, or a folder of the role's name that does. None: no certificates.
        insecure: whether to serve other hosts without certificates.
        role: who this process is.

    Raises:
        StartupError: a file is missing, unreadable or not what it should be, or the certificate has
            expired, is another role's, or is not signed by the CA beside it.
    """
    if folder is None:
        return Security(None, insecure)
    try:
        if not (folder / CERTIFICATE_FILE).exists():
            folder = folder / role
        ca, certificate, key = ((folder / name).read_bytes() for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE))
    except OSError as error:
        raise StartupError(
            f"the {role}'s certificates: {error.filename} cannot be read: {error.strerror}; "
            "make certificates with: windlass certs init DIR"
        ) from None
    path = folder / CERTIFICATE_FILE
    try:
        shown = _shown(folder)
    except ssl.SSLCertVerificationError as error:
        raise StartupError(
            f"{path} cannot be used with the {CA_FILE} beside it: {error.verify_message}; "
            f"make another one with: windlass certs issue DIR {role}"
        ) from None
    except ssl.SSLError as error:
        raise StartupError(
            f"{CA_FILE}, {CERTIFICATE_FILE} and {KEY_FILE} in {folder} are no CA, certificate and key that belong "
            f"together: {error.reason or error}"
        ) from None
    found = role_of([value for _, value in shown.get("subjectAltName", ())])
    if found != role:
        whose = f"a {found}'s" if found else "no role's"
        raise StartupError(
            f"{path} is {whose} certificate, not a {role}'s; make one with: windlass certs issue DIR {role}"
        )
    days = (ssl.cert_time_to_seconds(shown["notAfter"]) - time.time()) / _DAY_S
    if days < WARN_DAYS:
        log.warning("%s expires in %.0f days: issue a new one, and start this process again", path, days)
    return Security(Certificates(ca, certificate, key), insecure)


def _shown(folder: Path) -> dict[str, Any]:
    """What a peer with the same CA is shown: a TLS handshake of the files with themselves, in memory.

    It checks what every real one will: key, signature, dates, purpose.

    Raises:
        ssl.SSLError: they do not get through it.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # A password of its own, or a key that wants one would ask for it at the terminal.
    server.load_cert_chain(folder / CERTIFICATE_FILE, folder / KEY_FILE, password="")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(folder / CA_FILE)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    waiting = True
    while waiting:
        waiting = False
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waiting = True
    return dict(ends[0].getpeercert() or {})


def refuse_exposure(listen: str, security: Security) -> None:
    """See that a process serves other hosts only with certificates, or when it is told to go without.

    Args:
        listen: host:port.
        security: what the process has.

    Raises:
        StartupError: it would let anybody in who reaches it.
    """
    if security.certificates is None and not security.insecure and not _is_loopback(listen.rpartition(":")[0]):
        raise StartupError(
            f"refused to listen on {listen} without certificates, where anybody who reaches it could change the run: "
            "give --certificates DIR (made by: windlass certs init DIR) or security.certificates=DIR, or, in a "
            "network that you trust, --insecure or security.insecure=true"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"

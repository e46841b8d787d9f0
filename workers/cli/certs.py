"""`windlass certs`: a private CA in a folder, and a certificate for each role.

DIR/ca/{ca.pem,ca.key} and DIR/<role>/{ca.pem,cert.pem,key.pem}; a key is readable by its owner alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from ps.errors import ConfigError, StartupError
from ps.storage.files import make_directory, reason, write_atomic
from ps.wire.security import CA_FILE, CERTIFICATE_FILE, KEY_FILE, ROLES, load_security

app = typer.Typer(help="Make and show certificates, for TLS between the roles.")

CA_FOLDER, CA_KEY_FILE = "ca", "ca.key"
#: Apple's limit for certificates of servers, and as good as any.
LEAF_DAYS = 825
#: As long as the CA itself.
MAX_DAYS = 3650
_PRIVATE = 0o600

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the CA and the certificates.")]
Days = Annotated[int, typer.Option(min=1, max=MAX_DAYS, help="For so long the certificates are valid.")]


@app.callback(invoke_without_command=True)
def _certs(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def init(
    folder: Folder,
    days: Days = LEAF_DAYS,
    force: Annotated[bool, typer.Option("--force", help="Replace the CA, and with it every certificate.")] = False,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Keep what is there; make the rest.")] = False,
) -> int:
    """Make a CA, and a certificate for each role."""
    from ps.wire import authority

    ca = folder / CA_FOLDER
    certified = [role for role in ROLES if _is_certified(folder / role, role)]
    begun = any((folder / role / CERTIFICATE_FILE).exists() for role in ROLES) or (
        (ca / CA_FILE).exists() and (ca / CA_KEY_FILE).exists()
    )
    if begun and not force and not if_missing:
        raise ConfigError(
            f"{folder} holds a CA or its certificates already: --if-missing keeps them and makes what is missing, "
            "--force replaces them all, and every role then needs its new one"
        )
    if force or not begun:
        pair = authority.make_authority(datetime.now(UTC))
        make_directory(ca)
        write_atomic(ca / CA_KEY_FILE, pair.key, _PRIVATE)
        write_atomic(ca / CA_FILE, pair.certificate)
        certified = []
    missing = [role for role in ROLES if role not in certified]
    for role in missing:
        _issue(folder, role, role, folder / role, days)
    print(f"{folder}: made certificates of {', '.join(missing)}" if missing else f"{folder}: everything is there")
    print(f"keep {ca / CA_KEY_FILE} to yourself: who has it can join every run as any role")
    return 0


@app.command()
def issue(
    folder: Folder,
    role: Annotated[str, typer.Argument(metavar="ROLE", help=f"One of {', '.join(ROLES)}.")],
    name: Annotated[str | None, typer.Option(help="Whose it is, for people. Default: the role.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to put it. Default: DIR/ROLE, or DIR/ROLE-NAME.")] = None,
    days: Days = LEAF_DAYS,
) -> int:
    """Make one more certificate, or a new one in the place of an old one."""
    if role not in ROLES:
        raise ConfigError(f"ROLE={role}: a certificate's role is one of {', '.join(ROLES)}")
    if name is not None and Path(name).name != name:
        raise ConfigError(f"--name={name}: the name is part of a folder's; it cannot be empty or hold a /")
    out = out or folder / (role if name is None else f"{role}-{name}")
    _issue(folder, role, name or role, out, days)
    print(f"{out}: made a certificate of {role}")
    return 0


@app.command()
def show(folder: Folder) -> int:
    """List the certificates; the exit code is 1 if one of them cannot be used.

    That is: it has expired, or is not signed by the CA.
    """
    from ps.wire import authority

    now, usable = datetime.now(UTC), True
    lines = [f"{'role':<12} {'subject':<28} {'not before':<11} {'not after':<11} {'days left':>9}  SHA-256"]
    for path, ca in _certificates(folder):
        try:
            facts = authority.examine(_read(path), _read(ca))
        except ConfigError as error:
            raise ConfigError(f"{path} and {ca}: {error}") from None
        wrong = [] if facts.signed else [f"not signed by {ca}"]
        wrong += ["expired"] if facts.not_after <= now else []
        usable = usable and not wrong
        lines.append(
            f"{'CA' if path.name == CA_FILE else facts.role or 'none':<12} {facts.subject:<28} "
            f"{facts.not_before:%Y-%m-%d}  {facts.not_after:%Y-%m-%d}  {facts.days_left(now):>9}  {facts.fingerprint}"
            + (f"  {path}: {' and '.join(wrong)}" if wrong else "")
        )
    print("\n".join(lines))
    return 0 if usable else 1


def _certificates(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Every certificate in a folder, with the one of the CA that should have signed it.

    Raises:
        ConfigError: there is none.
    """
    authority = folder / CA_FOLDER / CA_FILE
    found = sorted([*folder.glob(CERTIFICATE_FILE), *folder.glob(f"*/{CERTIFICATE_FILE}")])
    if authority.exists():
        yield authority, authority
    elif not found:
        raise ConfigError(f"{folder} holds no certificates; make some with: windlass certs init {folder}")
    for path in found:
        yield path, authority if authority.exists() else path.with_name(CA_FILE)


def _is_certified(folder: Path, role: str) -> bool:
    """Whether a role could start with what is there; a crash may have left half of it."""
    try:
        return (folder / CERTIFICATE_FILE).exists() and load_security(folder, False, role).certificates is not None
    except StartupError:
        return False


def _issue(folder: Path, role: str, name: str, out: Path, days: int) -> None:
    from ps.wire import authority

    ca = folder / CA_FOLDER
    pair = authority.Pair(_read(ca / CA_FILE), _read(ca / CA_KEY_FILE))
    try:
        issued = authority.issue(pair, role, name, datetime.now(UTC), days)
    except ConfigError as error:
        raise ConfigError(f"{ca} cannot issue a certificate of {role}: {error}") from None
    make_directory(out)
    write_atomic(out / KEY_FILE, issued.key, _PRIVATE)
    write_atomic(out / CA_FILE, pair.certificate)
    write_atomic(out / CERTIFICATE_FILE, issued.certificate)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason(error)}") from None

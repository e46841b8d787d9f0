"""A private certificate authority: makes certificates and looks at them, as PEM. Pure but for random numbers.

Only `windlass certs` imports this; a role needs no more than `ps.wire.security`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ps.errors import ConfigError
from ps.wire.security import name_of, role_of, uri_of

CA_DAYS = 3650
#: Clocks of hosts differ: a certificate is valid from so long before it was made.
CLOCK_SKEW = timedelta(hours=1)
#: What X.509 allows in a common name.
MAX_NAME = 64


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Facts:
    """What a certificate says, for people."""

    subject: str
    #: None: it has no role.
    role: str | None
    not_before: datetime
    not_after: datetime
    #: SHA-256, as hexadecimal.
    fingerprint: str
    #: Whether the CA that it was compared with has signed it.
    signed: bool

    def days_left(self, now: datetime) -> int:
        """Whole days until it expires; negative: it has."""
        return (self.not_after - now).days


def make_authority(now: datetime) -> Pair:
    """Make a CA that signs certificates of roles and nothing below."""
    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own: of two CAs with one name, errors would say "bad signature" and not "unknown CA".
    name = _name(f"windlass CA {secrets.token_hex(4)}")
    builder = _builder(name, name, key.public_key(), now, now + timedelta(days=CA_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    return _signed(builder, key, key)


def issue(authority: Pair, role: str, name: str, now: datetime, days: int) -> Pair:
    """Make a key, and a certificate of a role for it.

    Args:
        authority: the CA.
        role: one of `ps.wire.security.ROLES`.
        name: whose it is, for people; at most 64 characters.
        now: when it begins.
        days: how long it is valid, at most as long as the CA.

    Raises:
        ConfigError: the CA's files are no certificate and its key, or the name is too long.
    """
    if not 1 <= len(name) <= MAX_NAME:
        raise ConfigError(f"the name {name!r} has {len(name)} characters; allowed are 1 to {MAX_NAME}")
    ca = _load(authority.certificate)
    try:
        ca_key = serialization.load_pem_private_key(authority.key, None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the CA's key is none: {error}") from None
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey) or ca_key.public_key() != ca.public_key():
        raise ConfigError("the CA's key is not the one of its certificate")
    key = ec.generate_private_key(ec.SECP256R1())
    end = min(now + timedelta(days=days), ca.not_valid_after_utc)
    builder = _builder(_name(name), ca.subject, key.public_key(), now, end)
    names = x509.SubjectAlternativeName([x509.DNSName(name_of(role)), x509.UniformResourceIdentifier(uri_of(role))])
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(both, critical=False).add_extension(names, critical=False)
    return _signed(builder.add_extension(issuer, critical=False), key, ca_key)


def examine(certificate: bytes, ca: bytes) -> Facts:
    """Say what is in a certificate, and whether a CA has signed it.

    Raises:
        ConfigError: one of them is no certificate.
    """
    found, authority = _load(certificate), _load(ca)
    try:
        found.verify_directly_issued_by(authority)
        signed = True
    except (ValueError, TypeError, InvalidSignature):
        signed = False
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris: Sequence[str] = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = ()
    return Facts(
        found.subject.rfc4514_string(),
        role_of(list(uris)),
        found.not_valid_before_utc,
        found.not_valid_after_utc,
        found.fingerprint(hashes.SHA256()).hex(),
        signed,
    )


def _load(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise ConfigError(f"not a certificate: {error}") from None


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=begin - CLOCK_SKEW,
        not_valid_after=end,
    ).add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _signed(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey
) -> Pair:
    certificate = builder.sign(signer, hashes.SHA256())
    form, encoding = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
    return Pair(certificate.public_bytes(encoding), key.private_bytes(encoding, form, serialization.NoEncryption()))

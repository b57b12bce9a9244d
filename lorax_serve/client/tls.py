"""TLS to a server: which roots are trusted, and what the client shows of itself."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from typing import Any

import grpc

from lorax_serve.errors import InvalidRequest

__all__ = ["Tls"]

# What OpenSSL says of a key that is none of the certificate's: of its kind, or of another.
_OF_ANOTHER = ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED", "KEY_TYPE_MISMATCH")


@dataclass(frozen=True)
class Tls:
    """Files for TLS, all of them PEM. A client reads them once, when it is made.

    Attributes:
        ca: roots to trust; None trusts those that come with gRPC (Mozilla's), or those in the file
            that ``GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`` names, not the operating system's.
        certificate: the client's own with its chain, for a server that asks for one.
        key: of that certificate, not encrypted; both are given, or none.
    """

    ca: str | os.PathLike[str] | None = None
    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None

    def credentials(self) -> Any:
        """What ``grpc.secure_channel`` takes. gRPC itself would tell of bad files only in its log.

        Raises:
            InvalidRequest: only one of certificate and key is given, a file cannot be read or has
                not what it should have, or the key is another one's; with the field and the file.
        """
        ca = None if self.ca is None else _certificates("ca", self.ca)
        if self.certificate is None and self.key is None:
            return grpc.ssl_channel_credentials(ca)
        if self.certificate is None:
            raise InvalidRequest(f"tls.key {self.key} needs tls.certificate beside it")
        if self.key is None:
            raise InvalidRequest(f"tls.certificate {self.certificate} needs tls.key beside it")
        certificate = _certificates("certificate", self.certificate)
        key = _read("key", self.key)
        _check_key(self.certificate, self.key)
        return grpc.ssl_channel_credentials(ca, key, certificate)


def _read(field: str, path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InvalidRequest(f"tls.{field} {path} cannot be read: {error.strerror}") from None


def _certificates(field: str, path: str | os.PathLike[str]) -> bytes:
    content = _read(field, path)
    try:
        # Comments between certificates may be in any language, and the parser takes ASCII.
        text = content.decode("ascii", "ignore")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        raise InvalidRequest(f"tls.{field} {path} has no certificates in PEM format") from None
    return content


def _check_key(certificate: str | os.PathLike[str], key: str | os.PathLike[str]) -> None:
    """Raise unless ``key`` is a private one, and that of ``certificate``, which is one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # how strong it has to be is for the server to say
    try:
        # With a password that nothing has, since Python would ask for one in the terminal.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason in _OF_ANOTHER:
            raise InvalidRequest(f"tls.key {key} is not the key of {certificate}") from None
        raise InvalidRequest(
            f"tls.key {key} has no private key in PEM format, or an encrypted one"
        ) from None

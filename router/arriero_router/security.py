"""TLS: certificates of the router's own, watched, and what it asks of clients and replicas."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Any

import grpc

from arriero_router.config import ConfigError, Tls, UpstreamTls
from arriero_router.endpoints.channel import Security

log = logging.getLogger("arriero.router")

_LOOK_SECONDS = 2.0


class _Latest(ssl.SSLContext):
    """Stands where a listener keeps its context; each handshake is that of `current`.

    A context in use can be given another certificate, but no authority can be taken from it, and it would resume the
    sessions of those whom it had trusted. A new one knows neither.
    """

    current: ssl.SSLContext

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        return self.current.wrap_bio(*arguments, **options)


class Certificates:
    """The certificate that clients are shown, and the authorities of theirs. When the files change, new connections go
    by the new ones; those that stand stay.
    """

    def __init__(self, tls: Tls) -> None:
        """Raises ConfigError where the files cannot be used."""
        self._tls = tls
        self.context = _Latest(ssl.PROTOCOL_TLS_SERVER)
        self._seen = self._stamps()
        try:
            self.context.current = self._load()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError("tls", [f"{tls.cert_file}, {tls.key_file}: {_why(error)}"]) from error

    async def watch(self) -> None:
        """Load the files again whenever they change, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            stamps = self._stamps()
            if stamps == self._seen:
                continue
            try:
                self.context.current = self._load()
            except (OSError, ssl.SSLError) as error:
                log.error("certificates stay as they were: %s: %s", self._tls.cert_file, _why(error))
            else:
                log.info("loaded the certificate %s again", self._tls.cert_file)
            self._seen = stamps

    def server_credentials(self) -> grpc.ServerCredentials:
        """For gRPC, which asks for the files' content again at each handshake after they changed."""
        mutual = self._tls.client_ca_file is not None

        def configuration() -> grpc.ServerCertificateConfiguration:
            tls = self._tls
            pair = (Path(tls.key_file).read_bytes(), Path(tls.cert_file).read_bytes())
            roots = Path(tls.client_ca_file).read_bytes() if tls.client_ca_file is not None else None
            return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

        told: list[tuple[object, ...]] = [self._stamps()]

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            stamps = self._stamps()
            if stamps == told[0]:
                return None
            try:
                fresh = configuration()
            except OSError:
                return None
            told[0] = stamps
            return fresh

        return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=mutual)

    def _load(self) -> ssl.SSLContext:
        """Raises OSError, ssl.SSLError: also for a pair that does not fit, as half of it is written yet."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self._tls.cert_file, self._tls.key_file)
        if self._tls.client_ca_file is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self._tls.client_ca_file)
        return context

    def _stamps(self) -> tuple[object, ...]:
        stamps: list[object] = []
        for name in (self._tls.cert_file, self._tls.key_file, self._tls.client_ca_file):
            if name is not None:
                try:
                    found = Path(name).stat()
                    stamps.append((found.st_mtime_ns, found.st_ino, found.st_size))
                except OSError:
                    stamps.append(None)
        return tuple(stamps)


def upstream_security(tls: UpstreamTls | None) -> Security:
    """How replicas are spoken to. Raises ConfigError where the files cannot be used."""
    if tls is None:
        return Security()
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        context.set_alpn_protocols(["http/1.1"])
        key = chain = None
        if tls.cert_file is not None and tls.key_file is not None:
            context.load_cert_chain(tls.cert_file, tls.key_file)
            key, chain = Path(tls.key_file).read_bytes(), Path(tls.cert_file).read_bytes()
        roots = Path(tls.ca_file).read_bytes() if tls.ca_file is not None else None
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("upstreamTls", [f"{tls.ca_file or tls.cert_file}: {_why(error)}"]) from error
    return Security(context, grpc.ssl_channel_credentials(roots, key, chain), tls.server_name or "")


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else "") or str(error)

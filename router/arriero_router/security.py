"""TLS: certificates of the router's own, watched, and what it asks of clients and replicas."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

import grpc

from arriero_router.config import ConfigError, Tls, UpstreamTls
from arriero_router.endpoints.channel import Security

log = logging.getLogger("arriero.router")

_LOOK_SECONDS = 2.0


class Certificates:
    """The certificate that clients are shown. When its files change, new connections get the new one."""

    def __init__(self, tls: Tls) -> None:
        """Raises ConfigError where the files cannot be used."""
        self._tls = tls
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        if tls.client_ca_file is not None:
            self.context.verify_mode = ssl.CERT_REQUIRED
        self._seen = self._stamps()
        try:
            self._load(self.context)
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
                # A pair that does not fit (half of it is written yet) would leave the context in use without a key.
                self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
                self._load(self.context)
            except (OSError, ssl.SSLError) as error:
                log.error("the certificate stays as it was: %s: %s", self._tls.cert_file, _why(error))
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

    def _load(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self._tls.cert_file, self._tls.key_file)
        if self._tls.client_ca_file is not None:
            context.load_verify_locations(self._tls.client_ca_file)

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

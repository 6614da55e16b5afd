"""Fetching one file of a store that is not trusted: over verified TLS, and no more bytes than are expected.

TLS is the clients' own (aiohttp, botocore ...), which verify certificates unless they are told not to. So refused is
what tells them: an unencrypted protocol, endpoint or redirect, and certificates that go unchecked. A server on this
machine (a tunnel, a test) may do without.
"""

import ipaddress
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import fsspec

from fitscale.config.errors import UserError

PLAIN = ("http", "ftp", "webhdfs", "jupyter", "jlab")  # protocols without encryption
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "STORAGE_EMULATOR_HOST")  # which the stores' clients read
VERIFYING = ("verify", "verify_ssl", "ssl", "use_ssl", "ssl_verify")  # their options that may be False


def fetch_file(location: str, name: str, path: Path, most: int, exact: bool) -> None:
    """Copy the file `name` of the shard set at the URL `location` to `path`.

    Raises:
        OSError: it has more than `most` bytes, or not `most` though it should (`exact`).
        UserError: fsspec does not know such a URL; the connection would not be safe.
    """
    url = f"{location.rstrip('/')}/{name}"
    store, root = _open_store(location, url)
    store.get_file(f"{root.rstrip('/')}/{name}", str(path), callback=_Limit(most))
    if (came := path.stat().st_size) > most or (exact and came != most):
        raise OSError(f"{came} bytes came, the index says {most}")


class _Limit(fsspec.Callback):
    """Ends a transfer once more than `most` bytes came."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def call(self, *_: Any, **__: Any) -> None:
        if self.value > self.most:
            raise OSError(f"more than {self.most} bytes came, which is what the index says")


def _open_store(location: str, url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The store and the path in it; the file's name is no part of what chooses the store."""
    if "::" in location:
        raise UserError(f"{url}: one URL, without ::, names a shard set")
    _require_tls(url, url)
    options = _session_options() if location.startswith(("http://", "https://")) else {}
    try:
        store, root = fsspec.core.url_to_fs(location, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: {error}") from error
    for key, value in _leaves(store.storage_options):
        if key in VERIFYING and value is False:
            raise UserError(f"{url}: {key}=False would leave the store's certificate unchecked; take it away")
        if isinstance(value, str) and "://" in value:
            _require_tls(value, url)
    for endpoint in ENDPOINTS:
        _require_tls(os.environ.get(endpoint, ""), f"{url}: {endpoint}")
    return store, root


def _require_tls(target: str, what: str) -> None:
    """Raise UserError if the URL `target` is unencrypted, and not of this machine."""
    parts = urlsplit(target)
    if parts.scheme in PLAIN and not _is_here(parts.hostname or ""):
        raise UserError(f"{what}: {parts.scheme}:// is not encrypted; use https:// (only this machine may do without)")


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _leaves(options: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(options, dict):
        for name, value in options.items():
            yield from _leaves(value, str(name))
    else:
        yield key, options


@cache  # fsspec keeps one session for equal options
def _session_options() -> dict[str, Any]:
    """Options of fsspec's HTTP store, beside the user's own: a redirect may not leave TLS."""
    try:
        import aiohttp
    except ImportError:  # fsspec says so when it opens the store
        return {}

    async def on_redirect(session: Any, context: Any, params: Any) -> None:
        source = str(params.url)
        target = urljoin(source, params.response.headers.get("Location", ""))
        if source.startswith("https://") and not target.startswith("https://"):
            raise UserError(f"{source}: leads away from https://, to {target[:200]!r}")
        _require_tls(target, f"{source}: leads to {target[:200]!r}")

    tracing = aiohttp.TraceConfig()
    tracing.on_request_redirect.append(on_redirect)
    own = fsspec.config.conf.get("https", {}).get("client_kwargs", {})
    return {"client_kwargs": {**own, "trace_configs": [*own.get("trace_configs", []), tracing]}}

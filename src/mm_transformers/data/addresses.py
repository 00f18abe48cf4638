"""Fetches addresses in the cells of tables, as far as the user permits it."""

from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from ..model.downloads import fetch, is_url
from ..model.file_contents import UnreadableFile, check_file, content_of
from ..model.label_cells import shorten
from ..model.limits import limits, named


# Protocols that only unpack a file, and stores on the Internet, by the names of the file systems of `datasets`.
_ARCHIVES = {"zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4", "file"}
_STORES = {"hf", "s3", "gs", "gcs", "abfs", "abfss", "az"}


class Addresses:
    """
    Reads the content of addresses in cells, as far as the user permits it.

    An address is an http(s) address, a file in a store (`hf://...`, `s3://...`) or in an archive
    (`zip://a.png::b.zip`). Members of local archives count as local files; all others need permission.

    Args:
        allow_urls (`bool` or `list[str]`):
            `False` for none. `True` for http(s) addresses of the public Internet and for stores. A list allows only its
            hosts (`"example.org"`), which may have a private address, and its stores (`"hf://"`).

    Raises:
        ValueError: if `allow_urls` is something else.
    """

    def __init__(self, allow_urls: bool | Collection[str] = False):
        self.names: frozenset[str] = frozenset()
        if isinstance(allow_urls, bool):
            self.allows_all = allow_urls
            return
        if isinstance(allow_urls, str) or not all(isinstance(name, str) and name for name in allow_urls):
            raise ValueError(f"allow_urls must be True, False or a list of hosts, but is {allow_urls!r}.")
        for name in allow_urls:
            if "/" in name and not name.endswith("://"):
                raise ValueError(
                    f"allow_urls names {name!r}: give the host only, {urlsplit(name).hostname or 'example.org'!r}."
                )
        self.allows_all, self.names = False, frozenset(name.lower() for name in allow_urls)

    def fetch(self, url: str) -> bytes:
        """
        The content of an http(s) address.

        Raises:
            OSError, ValueError: if it is not allowed, or cannot be fetched.
        """
        if not self.allows_all and not self.names:
            raise UnreadableFile(_refused(url))
        return fetch(url, public_only=True) if self.allows_all else fetch(url, hosts=self.names)

    def at_hand(self, cell: Any) -> Any:
        """
        The cell with the bytes of its address; a cell without an address is unchanged.

        Raises:
            ValueError: one sentence, if the address is not allowed or cannot be opened.
        """
        path = None if isinstance(cell, Mapping) and cell.get("array") is not None else content_of(cell)
        # The rest of a `file://` address begins with "/". The reader names texts of damaged data.
        if not isinstance(path, str) or "://" not in path[:100] or path.startswith(("/", "data:")):
            return cell
        try:
            content = self.fetch(path) if is_url(path) else self._open(path)
        except Exception as error:  # from file systems: OSError, ImportError, KeyError for members of archives, ...
            is_whole = isinstance(error, UnreadableFile)
            reason = str(error) if is_whole else shorten(" ".join(str(error).split()))
            raise ValueError(f"{shorten(path)!r} cannot be opened ({reason or type(error).__name__})") from error
        return {**(cell if isinstance(cell, Mapping) else {}), "bytes": content, "path": path}

    def _open(self, path: str) -> bytes:
        parts = path.split("::")
        for place, part in enumerate(parts, 1):
            if "://" in part or place < len(parts):
                self._check(part, is_last=place == len(parts))
        if parts[-1].partition("://")[0].lower() not in _STORES and not is_url(parts[-1]):
            check_file(parts[-1].removeprefix("file://"))
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            content = file.read(int(limits().file_bytes) + 1)
        if len(content) > limits().file_bytes:
            raise UnreadableFile(f"it has more bytes than {named('file_bytes')}")
        return content

    def _check(self, part: str, is_last: bool) -> None:
        """Checks one address of a chain, as in `zip://a.png::hf://...`. Only the last may be a local file."""
        scheme, separator, _ = part.partition("://")
        scheme = scheme.lower()
        if not separator or (scheme == "file" and not is_last):
            raise UnreadableFile(
                f"{shorten(part)!r} is before '::', but only a file in an archive may be there, as in "
                "zip://a.png::b.zip"
            )
        if scheme in _ARCHIVES:
            return
        if scheme in _STORES:
            if not self.allows_all and f"{scheme}://" not in self.names:
                raise UnreadableFile(_refused(part))
        elif is_url(part):
            # Here `datasets` connects without a check of the IP address, so the user must name the host.
            if urlsplit(part).hostname not in self.names:
                raise UnreadableFile(f"{_refused(part)}; to open an archive there, give its host in allow_urls")
        else:
            raise UnreadableFile(
                f"addresses that begin with {scheme[:20]}:// are not opened: give a file, or its bytes"
            )


def _refused(address: str) -> str:
    named_host = urlsplit(address).hostname if is_url(address) else f"{address.partition('://')[0]}://"
    return (
        "it is a network address, which is opened only if you allow it: allow_urls=True for the public Internet, or "
        f"allow_urls=[{shorten(str(named_host))!r}]; on the command line --allow-urls or --allow-host"
    )


NO_ADDRESSES = Addresses()

"""The files of a repository on the Hub, read by HTTP range through huggingface_hub's session."""

import re
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined] # exported at run time only
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from bake import __version__
from bake.checkpoints.hub_errors import translated
from bake.checkpoints.hub_patience import patiently
from bake.checkpoints.source import Stamps
from bake.errors import CheckpointError, HubError

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_HEAD = 1 << 16  # first request for a shard: enough for the header of most
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class HubFiles:
    """The files of one commit, read by HTTP range.

    Attributes:
        repo: ``owner/name``.
        commit: the commit, so that every request reads the same files.
    """

    repo: str
    commit: str
    _heads: dict[str, tuple[int, bytes]] = field(default_factory=dict, repr=False)

    @property
    def stamps(self) -> Stamps:
        """Nothing of this machine is read."""
        return Stamps()

    def size(self, file: str) -> int:
        """Return a file's length in bytes, and keep its first bytes for the header."""
        if file not in self._heads:
            head = bytearray(_HEAD)
            total = self._fetch(file, 0, memoryview(head))
            self._heads[file] = (total, bytes(head[:total]))
        return self._heads[file][0]

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from offset ``start`` on.

        Raises:
            HubError: the Hub refuses, cannot be reached or sends another range.
        """
        size = self.size(file)
        if start + len(buffer) > size:
            raise CheckpointError(f"ends at byte {size}, within a tensor", where=file)
        _, head = self._heads[file]
        if start + len(buffer) <= len(head):
            buffer[:] = head[start : start + len(buffer)]
        else:
            self._fetch(file, start, buffer)

    def _fetch(self, file: str, start: int, buffer: memoryview) -> int:
        """Request one range, again if the fault may pass, and return the file's length."""
        with translated(self.repo, self.commit):
            return patiently(lambda: self._request(file, start, buffer))

    def _request(self, file: str, start: int, buffer: memoryview) -> int:
        headers = build_hf_headers(library_name="bake", library_version=__version__)
        headers["Range"] = f"bytes={start}-{start + len(buffer) - 1}"
        headers["Accept-Encoding"] = "identity"  # compressed bytes would have other offsets
        url = hf_hub_url(self.repo, file, revision=self.commit)
        with get_session().stream(
            "GET",
            url,
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        ) as response:
            hf_raise_for_status(response)
            total = self._check_range(response, start, len(buffer))
            count = _drain(response, buffer)
        if count != min(len(buffer), total - start):
            raise HubError(
                f"the Hub sent other than the {len(buffer)} bytes asked for",
                where=f"{self.repo}: {file}",
            )
        return total

    def _check_range(self, response: Any, start: int, length: int) -> int:
        """Return the file's length once the reply is the range that was asked for."""
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code == 206 and match is not None:
            first, last, total = (int(group) for group in match.groups())
            if first == start and last == min(start + length, total) - 1:
                return total
        raise HubError(
            f"the server does not send byte ranges (status {response.status_code})",
            where=self.repo,
            why="reading one tensor would transfer the whole file",
            fix="download the repository and name the folder",
        )


def _drain(response: Any, buffer: memoryview) -> int:
    """Copy a reply into ``buffer`` and return its length, without reading far past the end."""
    count = 0
    for chunk in response.iter_bytes(_CHUNK):
        if count + len(chunk) <= len(buffer):
            buffer[count : count + len(chunk)] = chunk
        count += len(chunk)
        if count > len(buffer):
            break
    return count

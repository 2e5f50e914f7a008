"""Downloads from the hub: checksums, and errors in the words of a user who fetches something."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from fedml_plugin_fedmosaic.core.errors import DataError

T = TypeVar("T")
_CHUNK = 1 << 22
CHECKSUM = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
"""Form of a checksum of the hub: SHA-256, or git's SHA-1 of small files."""


def reached(what: str, download: Callable[[], T]) -> T:
    """Runs a download.

    Args:
        what: named in the error.
        download: calls ``huggingface_hub``.

    Raises:
        DataError: it failed; the hint says what to do about it.
    """
    from huggingface_hub import errors

    try:
        return download()
    except errors.GatedRepoError as error:
        raise _problem(
            what, error, "accept its licence on the hub's page, then log in: 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _problem(
            what, error, "check the spelling; a private repository needs 'hf auth login' first"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise _problem(
            what,
            error,
            "run this where there is internet and HF_HUB_OFFLINE is not set; behind a proxy, set "
            "HTTPS_PROXY",
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise _problem(
            what, error, "run the same command again: it goes on where it was"
        ) from error
    except ValueError as error:
        raise _problem(what, error, "write OWNER/NAME as on the hub's page") from error


def published_checksum(repository: str, name: str, kind: Literal["dataset", "model"]) -> str | None:
    """The checksum that the hub gives for a file: SHA-256 of large files, git's SHA-1 of others.

    Args:
        repository: ``owner/name``.
        name: of the file.
        kind: of the repository.

    Returns:
        Lower-case hexadecimal digits; None if the hub's answer has another form.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    etag = get_hf_file_metadata(hf_hub_url(repository, name, repo_type=kind)).etag or ""
    text = etag.lower()
    return text if CHECKSUM.fullmatch(text) else None


def checksum_matches(path: Path, checksum: str) -> bool:
    """Whether a file has a checksum of :func:`published_checksum`.

    Args:
        path: the file.
        checksum: 64 digits of SHA-256, or 40 of the SHA-1 that git gives a file's content.
    """
    if len(checksum) == 64:
        digest = hashlib.sha256()
    else:
        # Names the object in git; nothing secret depends on it.
        digest = hashlib.sha1(usedforsecurity=False)
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == checksum


def require_checksum(path: Path, checksum: str | None, what: str) -> None:
    """Removes a downloaded file that is not what was published.

    Args:
        path: the file.
        checksum: published one; None if there is none, then nothing is checked.
        what: named in the error.

    Raises:
        DataError: it differs.
    """
    if checksum is None or checksum_matches(path, checksum):
        return
    path.unlink()
    raise DataError(
        f"{what}: its checksum is not the published one ({checksum}); the file was removed",
        hint="run the same command again; if it happens twice, ask the owner of the repository",
    )


def _problem(what: str, error: Exception, hint: str) -> DataError:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return DataError(f"{what} cannot be fetched: {reason}", hint=hint)

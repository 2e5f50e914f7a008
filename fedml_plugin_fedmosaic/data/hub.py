"""The hub's errors in the words of a user who wants to fetch something."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fedml_plugin_fedmosaic.core.errors import DataError

T = TypeVar("T")


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


def _problem(what: str, error: Exception, hint: str) -> DataError:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return DataError(f"{what} cannot be fetched: {reason}", hint=hint)

"""What can go wrong with a hub, as one line with a remedy, and which of it may pass by itself."""

from __future__ import annotations

import errno

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# huggingface_hub moved from requests to httpx to httpx2; the errors of all of them come through.
_TRANSPORTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)


class HubError(ValueError, OSError):
    """The network, the hub or the disk would not: nothing in the user's input is wrong."""


class CorruptFileError(HubError):
    """A file does not have the hash that the hub names."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of huggingface_hub carries, or None."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: lost connections, 5xx, 429."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled | HubError):
        return False
    if isinstance(error, HfHubHTTPError):
        return status_of(error) in _PASSING_STATUS
    if _is_transport(error) or isinstance(error, ConnectionError | TimeoutError):
        return True
    # The library's own check of a file's length raises an OSError without a number.
    return isinstance(error, OSError) and error.errno is None


def is_unreachable(error: BaseException) -> bool:
    """Whether the hub was not reached at all, or said that it cannot answer now."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled) or is_passing(error)


def explain(error: Exception, repo_id: str, revision: str | None) -> ValueError:
    """`error` as a ValueError (HubError where the input is not at fault) of one line with a remedy."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, ValueError) and not isinstance(error, HFValidationError):
        return error
    model = f"model={repo_id!r}"
    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, GatedRepoError):
        return ValueError(
            f"{model} is gated: accept its terms on the hub, then set HF_TOKEN or run `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ValueError(
            f"{model} is neither a directory here nor a public hub repository; check the "
            "spelling, or set HF_TOKEN if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return ValueError(
            f"{model} has no revision {revision!r}; give a branch, a tag or a commit of it"
        )
    if isinstance(error, EntryNotFoundError):
        return HubError(f"{model}{at}: the hub lists a file that it does not have; try again later")
    if isinstance(error, HFValidationError):
        return ValueError(f"{model} is not a valid hub id: {_first_line(error)}")
    return HubError(f"{model}{at} {_why_not_now(error)}")


def _why_not_now(error: Exception) -> str:
    status = status_of(error)
    if status == 429:
        return (
            "could not be downloaded (429, too many requests): wait some minutes and run the "
            "command again to resume; HF_TOKEN raises the limit"
        )
    if status is not None:
        return (
            f"could not be downloaded (the hub answers {status}: {_first_line(error)}); run the "
            "command again later to resume, or give a local directory"
        )
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return (
            f"could not be downloaded ({error.strerror}); free some space or give another "
            "--cache-dir (HF_HUB_CACHE), then run the command again to resume"
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return f"could not be stored ({error.strerror}: {error.filename}); give another --cache-dir"
    if is_unreachable(error):
        return (
            "is not complete in the local cache and the hub cannot be reached; check the network "
            "(HF_ENDPOINT, HF_HUB_OFFLINE) and run the command again, or give a local directory"
        )
    return f"could not be downloaded ({_first_line(error)}); run the command again to resume"


def _is_transport(error: BaseException) -> bool:
    return any(kind.__module__.partition(".")[0] in _TRANSPORTS for kind in type(error).__mro__)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

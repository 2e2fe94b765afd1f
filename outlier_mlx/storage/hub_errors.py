"""Errors of the hub, each in one line that says what to do."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from outlier_mlx.errors import OutlierError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_ADDRESS = re.compile(r"https?://\S+")
# By the name of huggingface_hub's error; subclasses come first.
_READING = {
    "GatedRepoError": "access is restricted; ask for it on its page, then run `hf auth login`",
    "RepositoryNotFoundError": "no such folder, nor repository on the hub; if private:"
    " `hf auth login`",
    "RevisionNotFoundError": "no such revision",
    "LocalEntryNotFoundError": "not in the local cache, and the hub cannot be reached",
    "OfflineModeIsEnabled": "not in the local cache, and the hub cannot be reached",
}
_WRITING = {
    401: "the hub does not accept this login: run `hf auth login`, or set HF_TOKEN",
    403: "this login may not write there: its token needs write access to {owner}",
    404: "no such repository or branch, or this login may not see it",
    409: "another program is writing to this repository: try again",
    412: "another program has changed this repository meanwhile: try again",
}


@contextmanager
def hub_errors(repo: str, *, writing: bool = False) -> Iterator[None]:
    """Turn huggingface_hub's many exceptions into one line that names the repository.

    Args:
        repo: what was asked for.
        writing: whether something is published, rather than fetched.

    Raises:
        OutlierError: in place of any other exception within the block.
    """
    hush_hub()
    try:
        yield
    except OutlierError:
        raise
    except Exception as error:
        raise OutlierError(f"{repo}: {_reason(repo, error, writing=writing)}") from error


def hush_hub() -> None:
    """Do not log each retry: the error at the end is enough."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _reason(repo: str, error: BaseException, *, writing: bool) -> str:
    from huggingface_hub import errors

    for name, reason in _READING.items():
        if not writing and isinstance(error, getattr(errors, name)):
            return reason
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__
    answered = next((c for c in causes if isinstance(c, errors.HfHubHTTPError)), None)
    if answered is not None and answered.response.status_code != 400:
        return _answer(repo, answered, writing=writing)
    if answered is None and any(isinstance(c, errors.HTTPError | ConnectionError) for c in causes):
        return f"the hub cannot be reached: {_told(error)}"
    local = next((c for c in causes if isinstance(c, OSError) and c.filename), None)
    if isinstance(local, OSError):
        return f"{local.filename}: {local.strerror}"
    if any(isinstance(c, json.JSONDecodeError) for c in causes):
        return "the hub's answer cannot be understood"
    return _told(error)


def _answer(repo: str, error: "HfHubHTTPError", *, writing: bool) -> str:
    status, said = error.response.status_code, error.server_message
    reason = f"the hub answered {status}"
    if status >= 500:
        reason = f"cannot be reached: {reason}"
    elif writing:
        reason = _WRITING.get(status, reason).format(owner=repo.split("/")[0])
    return f"{reason} ({_ADDRESS.sub('(address)', said)})" if said else reason


def _told(error: BaseException) -> str:
    """The message of an error, without addresses: signed ones, for uploads, are secret."""
    return _ADDRESS.sub("(address)", str(error)).strip() or type(error).__name__

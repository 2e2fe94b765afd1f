"""What the hub refuses, in one line that says what to do."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from outlier_mlx.errors import OutlierError

_ADDRESS = re.compile(r"https?://\S+")


@contextmanager
def talking(repo: str, *, quiet: bool) -> Iterator[None]:
    """The hub's bars on a terminal only, and its errors in one line that says what to do."""
    from huggingface_hub.utils import disable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the retries that it logs are told once, by what ends them
    shown = sys.stderr.isatty() and not quiet
    try:
        with nullcontext() if shown else disable_progress_bars():
            yield
    except OutlierError:
        raise
    except Exception as error:
        raise OutlierError(f"{repo}: {_reason(repo, error)}") from error
    finally:
        logger.setLevel(level)


def _reason(repo: str, error: BaseException) -> str:
    from huggingface_hub import errors

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__
    answered = next((c for c in causes if isinstance(c, errors.HfHubHTTPError)), None)
    if answered is not None and answered.response.status_code == 400:
        return _told(error)  # that says what is wrong with the request
    if answered is not None:
        return _refusal(repo, answered.response.status_code, answered.server_message)
    if any(isinstance(c, errors.HTTPError | ConnectionError) for c in causes):
        return "the hub cannot be reached"
    local = next((c for c in causes if isinstance(c, OSError) and c.filename), None)
    if isinstance(local, OSError):
        return f"{local.filename}: {local.strerror}"
    if any(isinstance(c, json.JSONDecodeError) for c in causes):
        return "the hub's answer cannot be understood"
    return _told(error)


def _told(error: BaseException) -> str:
    """What an error says; addresses to upload to are signed, so who has one may write there."""
    return _ADDRESS.sub("(address)", str(error)).strip() or type(error).__name__


def _refusal(repo: str, status: int, said: str | None) -> str:
    known = {
        401: "the hub does not accept this login: run `hf auth login`, or set HF_TOKEN",
        403: f"this login may not write there: its token needs write access to"
        f" {repo.split('/')[0]}",
        404: "no such repository or branch, or this login may not see it",
        409: "somebody else is writing there: try again",
        412: "somebody else has written there meanwhile: try again",
    }
    reason = known.get(status, f"the hub answered {status}")
    return f"{reason} ({_ADDRESS.sub('(address)', said)})" if said else reason

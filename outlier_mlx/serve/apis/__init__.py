"""The APIs, each a translator of its own: from bodies to requests, from pieces to what is sent.

`api` says what the server needs of each. `chat` is `/v1/chat/completions` and `text`
`/v1/completions`, with what `completions` has for both.
"""

from collections.abc import Callable, Mapping
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.api import Api
from outlier_mlx.serve.apis.chat import Chat
from outlier_mlx.serve.apis.text import Text

__all__ = ["APIS", "error_body", "new_apis"]

#: What makes the API of each path; all expect POST.
APIS: dict[str, Callable[[], Api]] = {
    "/v1/chat/completions": Chat,
    "/chat/completions": Chat,
    "/v1/completions": Text,
}


def new_apis() -> dict[str, Api]:
    """The APIs of a new server, by their paths."""
    return {path: make() for path, make in APIS.items()}


def error_body(apis: Mapping[str, Api], path: str, refused: Refused) -> dict[str, Any]:
    """The body of an error response in the format of the path's API; else, in OpenAI's."""
    api = apis.get(path)
    return refused.as_json() if api is None else api.error(refused)

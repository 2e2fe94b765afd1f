"""The APIs, each a translator of its own: from bodies to requests, from pieces to what is sent.

`api` says what the server needs of each. `chat` is `/v1/chat/completions` and `text`
`/v1/completions`, with what `completions` has for both. `responses` is `/v1/responses`: `items`
reads its conversations, `output` is what it sends, and `store` keeps that. `endpoints` is the table
of paths.
"""

from collections.abc import Mapping
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.api import Api
from outlier_mlx.serve.apis.chat import Chat
from outlier_mlx.serve.apis.responses import InputTokens, Responses
from outlier_mlx.serve.apis.text import Text

__all__ = ["error_body", "new_apis"]


def new_apis() -> dict[str, Api]:
    """The APIs of a new server, by their paths; all expect POST."""
    responses = Responses()
    return {
        "/v1/chat/completions": Chat(),
        "/chat/completions": Chat(),
        "/v1/completions": Text(),
        "/v1/responses": responses,
        "/v1/responses/input_tokens": InputTokens(responses),
    }


def error_body(apis: Mapping[str, Api], path: str, refused: Refused) -> dict[str, Any]:
    """The body of an error response in the format of the path's API; else, in OpenAI's."""
    api = apis.get(path)
    return refused.as_json() if api is None else api.error(refused)

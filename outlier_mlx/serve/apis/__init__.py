"""The APIs, each a translator of its own: from bodies to requests, from pieces to what is sent.

`api` says what the server needs of each. `chat` is `/v1/chat/completions` and `text`
`/v1/completions`, with what `completions` has for both. `responses` is `/v1/responses`: `items`
reads its conversations, `output` is what it sends, and `store` keeps that. `anthropic` is
`/v1/messages` and `/v1/messages/count_tokens`, whose bodies are read by `anthropic_request`.
`endpoints` is the table of paths.
"""

from collections.abc import Mapping
from email.message import Message
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.anthropic import VERSION, CountTokens, Messages
from outlier_mlx.serve.apis.api import Api
from outlier_mlx.serve.apis.chat import Chat
from outlier_mlx.serve.apis.responses import InputTokens, Responses
from outlier_mlx.serve.apis.text import Text

__all__ = ["error_answer", "new_apis"]


def new_apis() -> dict[str, Api]:
    """The APIs of a new server, by their paths; all expect POST."""
    responses = Responses()
    return {
        "/v1/chat/completions": Chat(),
        "/chat/completions": Chat(),
        "/v1/completions": Text(),
        "/v1/responses": responses,
        "/v1/responses/input_tokens": InputTokens(responses),
        "/v1/messages": Messages(),
        "/v1/messages/count_tokens": CountTokens(),
    }


def error_answer(
    apis: Mapping[str, Api], path: str, headers: Message | None, refused: Refused
) -> tuple[int, dict[str, Any]]:
    """Status and body of an error response.

    Args:
        apis: the APIs by their paths.
        path: the request's, which gives the format.
        headers: the request's, if they were read. On paths of no API, they tell a client of
            Anthropic's; all others get OpenAI's format.
        refused: the error.
    """
    api = apis.get(path)
    if api is None and headers is not None and VERSION in headers:
        api = apis["/v1/messages"]
    if api is None:
        return refused.status, refused.as_json()
    return api.statuses.get(refused.status, refused.status), api.error(refused)

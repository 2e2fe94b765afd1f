"""The one table of the server's paths, and what each expects."""

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis import new_apis
from outlier_mlx.serve.static import FILES

ENDPOINTS = {"/health": "GET", "/v1/models": "GET"}
ENDPOINTS |= dict.fromkeys(new_apis(), "POST") | dict.fromkeys(FILES, "GET")
#: What stands below a path, by its id or name.
_NAMED = {"/v1/models/": ("GET",), "/v1/responses/": ("GET", "DELETE")}
#: Endpoints of these APIs that programs may ask for, by the beginning of the path.
UNSUPPORTED = {
    "/v1/embeddings": "it generates text, and makes no embeddings",
    "/v1/moderations": "it generates text, and judges none",
    "/v1/audio": "it neither hears nor speaks",
    "/v1/images": "it makes no images",
    "/v1/videos": "it makes no videos",
    "/v1/realtime": "it neither hears nor speaks",
    "/v1/files": "it keeps no files",
    "/v1/uploads": "it keeps no files",
    "/v1/vector_stores": "it keeps no files",
    "/v1/batches": "send the requests one by one; they are generated together",
    "/v1/conversations": "/v1/responses has previous_response_id",
    "/v1/assistants": "use /v1/responses",
    "/v1/threads": "use /v1/responses",
    "/v1/fine_tuning": "it does not train",
    "/v1/evals": "`outlier-mlx eval` evaluates",
    "/v1/rerank": "it generates text, and ranks none",
    "/v1/score": "it generates text, and ranks none",
}


def methods(path: str) -> tuple[str, ...]:
    """The methods that a path expects, besides OPTIONS, and HEAD where there is GET.

    Raises:
        Refused: 404, there is no such endpoint. Clients would try again after a status of 500 or
            more, so one that is known and not supported has this status, too.
    """
    if path in ENDPOINTS:
        return (ENDPOINTS[path],)
    for beginning, found in _NAMED.items():
        if path.startswith(beginning):
            return found
    for beginning, reason in UNSUPPORTED.items():
        if path == beginning or path.startswith(f"{beginning}/"):
            text = f"this server does not support {path[:80]}: {reason}"
            raise Refused(404, text, "unsupported_endpoint")
    raise Refused(404, f"unknown endpoint {path[:80]}")

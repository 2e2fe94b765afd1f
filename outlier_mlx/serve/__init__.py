"""An OpenAI-compatible server for one model: mlx-lm's server behind stricter checks.

`options` are the server's options, `access` checks the client, `limits` checks the parameters of a
request, `http` reads requests from the network, `mlxlm_server` passes them to mlx-lm, `generator`
generates for all of them in one thread, `capacity` divides the memory, and `server` starts and
stops everything.
"""

from outlier_mlx.serve.options import ServeOptions
from outlier_mlx.serve.server import serve

__all__ = ["ServeOptions", "serve"]

"""An OpenAI-compatible server for one model: mlx-lm's, behind checks of its own.

`access` knows who may ask, `limits` what may be asked, `http` reads it from the network,
`mlxlm_server` hands it to mlx-lm, `server` binds, loads, and ends.
"""

from outlier_mlx.serve.server import ServeOptions, serve

__all__ = ["ServeOptions", "serve"]

"""A server for one model with the APIs that programs know, for many requests at a time.

`options` are the server's options, and `access` checks the client. `connections` bounds how many
there are, and how slow; `http` reads requests from them, and `handler` answers them: one of the
`apis` turns a body into a `request`, by the tables in `fields` and within the server's `limits`,
and has the format of what is sent; `messages` reads conversations; `prompts` bounds and tokenizes
text; `provider` loads the model. `generator` has the side of the requests' threads, and gives each
of its `jobs` to the `loop`, the one thread that generates: it reads the prompts of `waiting`
`sequences` at the `pace` of `pace`, and takes steps of a `batch`, or of a `single` one with drafts;
`sampling` says how tokens are chosen. `replies` follows one reply, which `pieces` and `calls`
divide into text, reasoning and tool calls; `together` follows several.
`structured` holds answers to the form that a request demands, with the `call_grammar` of the model.
`prefix_cache` finds what was read before in the `prefix_tree`, whose nodes have `cache_parts`;
`cache_folder` keeps them on disk, each in a `cache_file`, for the model that `cache_dir` names.
`capacity` divides the memory, and `memory` shares it out to requests. `server` starts and stops
everything.
"""

from outlier_mlx.serve.options import ServeOptions
from outlier_mlx.serve.server import serve

__all__ = ["ServeOptions", "serve"]

"""Talking with a model.

`conversation` keeps messages and KV cache, `files` puts them on disk, `repl` reads lines and obeys
commands, `markdown` shows replies as they come.
"""

from outlier_mlx.chat.conversation import Conversation

__all__ = ["Conversation"]

"""How much of a file must be at hand to open it: enough for any form of overlay or base."""

from outlier_mlx.checkpoints import monolith, packed
from outlier_mlx.storage.safetensors import header_bytes


def head_bytes(name: str, begin: bytes) -> int:
    """Bytes from the beginning of a file of tensors that are read when a checkpoint is opened.

    Args:
        name: its name, which may have folders in it.
        begin: its first bytes.
    """
    if name.endswith(".safetensors"):
        return header_bytes(begin)
    if name == f"{packed.FOLDER}/{packed.MONOLITH}":
        return monolith.head_bytes(begin)
    return 0

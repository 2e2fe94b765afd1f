"""What `prism_hadamard_qwen35` packs have in common: MLX 2-bit codes of a rotated Qwen3.5.

Source: mlx-lm 0.32, `models/prism_hadamard_qwen35.py`.
"""

MODEL_TYPE = "prism_hadamard_qwen35"
#: The model under it.
BASE_TYPE = "qwen3_5"
#: Where mlx-lm's model has the text model that a manifest's paths start from.
ROOT = "language_model."
#: By `schema_version`: `tensor_namespace`. Names of tensors start from the text model in the first.
NAMESPACES = {1: "mlx-lm-text", 2: "mlx-vlm-qwen3_5"}
GROUP = 128
QUANTIZATION = {"bits": 2, "group_size": GROUP, "mode": "affine"}
#: Columns that are transformed together; 0: a module is not rotated.
BLOCKS = (0, 512, 1024, 2048, 4096, 8192)
EMBEDDING = "embed_tokens"

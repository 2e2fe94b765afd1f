"""Outlier features of models as others published them: reference marks, not expectations.

Both sets are by arb8020 (the repository arb8020/research, folder dev/outlier-features, and the
posts about it). They differ from each other by up to four points where they overlap, with other
checkpoints, precisions and numbers of sequences, and the author calls the first "not rigorous".
"""

from dataclasses import dataclass

#: Points by which a published value may be off.
SPREAD = 4.0


@dataclass(frozen=True)
class Published:
    """One published model.

    Attributes:
        model: its name.
        total_params: in all.
        active_params: that a token uses.
        layer_pct: mean share of probes that an outlier feature is in, percent.
        seq_pct: mean share of positions that it is at, percent.
    """

    model: str
    total_params: float
    active_params: float
    layer_pct: float
    seq_pct: float


#: The post's own table: few sequences, OLMoE as instructed, GLM from two batches.
FIRST = (
    Published("OLMoE-1B-7B", 7e9, 1.3e9, 28.0, 14.3),
    Published("Qwen3-30B-A3B", 30.5e9, 3.3e9, 35.5, 45.1),
    Published("GLM-4.5-Air", 106e9, 12e9, 67.4, 46.8),
)
#: The later run: 16 sequences a model.
LATER = (
    Published("OLMoE-1B-7B", 7e9, 1.3e9, 29.5, 13.6),
    Published("GPT-OSS-20B", 21e9, 3.6e9, 38.1, 45.4),
    Published("Qwen3-30B-A3B", 30.5e9, 3.3e9, 35.5, 45.1),
    Published("Mixtral-8x7B", 47e9, 12.9e9, 50.2, 37.4),
    Published("Qwen3-Next-80B", 80e9, 3.0e9, 57.5, 35.1),
    Published("GLM-4.5-Air", 106e9, 12e9, 63.3, 45.7),
    Published("GPT-OSS-120B", 117e9, 5.1e9, 33.1, 50.0),
    Published("Qwen3-0.6B", 0.6e9, 0.6e9, 32.7, 66.5),
    Published("Qwen3-1.7B", 1.7e9, 1.7e9, 30.3, 78.4),
    Published("Qwen3-4B", 4e9, 4e9, 34.8, 68.8),
    Published("Qwen3-8B", 8e9, 8e9, 32.3, 70.8),
    Published("Qwen3-14B", 14e9, 14e9, 31.4, 79.0),
)

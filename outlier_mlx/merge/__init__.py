"""Merging dense models of one shape into a mixture of experts, a frankenMoE.

Attention, norms and embeddings come from one base model, the experts' FFNs from several others.
The configuration is mergekit-moe's: https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md
"""

from outlier_mlx.merge.run import Merged, merge

__all__ = ["Merged", "merge"]

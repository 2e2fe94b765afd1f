"""Sizes by kind of part: the table that the terminal and a tier's card show."""

from collections.abc import Iterable
from dataclasses import dataclass

KINDS = (
    "embeddings",
    "attention",
    "dense FFN",
    "shared FFN",
    "experts",
    "router",
    "norms",
    "head",
)
# Parts of tensor names in a tier or a plain MLX model, and their kinds. The first match counts.
_SIGNS = (
    ("embed_tokens", "embeddings"),
    ("lm_head", "head"),
    (".q_norm.", "norms"),
    (".k_norm.", "norms"),
    ("self_attn", "attention"),
    (".linear_attn.in_proj", "attention"),
    (".linear_attn.out_proj", "attention"),
    ("switch_mlp", "experts"),
    (".experts.", "experts"),
    ("shared_expert", "shared FFN"),
    (".mlp.gate.", "router"),
    (".mlp.alpha", "router"),
    (".block_sparse_moe.gate.", "router"),
    (".mlp.", "dense FFN"),
)


@dataclass(frozen=True)
class SummaryRow:
    """Parameters and bytes of one kind of part."""

    kind: str
    params: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per parameter, scales included."""
        return 8 * self.nbytes / self.params if self.params else 0.0


def kind_of(name: str) -> str:
    """The kind of a tensor, by its name in a tier."""
    return next((kind for sign, kind in _SIGNS if sign in name), "norms")


def summarize(sizes: Iterable[tuple[str, int, int]]) -> list[SummaryRow]:
    """Add up (kind, parameters, bytes) by kind; the total is last."""
    params = dict.fromkeys(KINDS, 0)
    nbytes = dict.fromkeys(KINDS, 0)
    for kind, count, size in sizes:
        params[kind] += count
        nbytes[kind] += size
    rows = [SummaryRow(kind, params[kind], nbytes[kind]) for kind in KINDS if params[kind]]
    return [*rows, SummaryRow("total", sum(params.values()), sum(nbytes.values()))]

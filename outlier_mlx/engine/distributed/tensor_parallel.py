"""Tensor parallel: every rank has a part of each layer's heads, FFN and experts.

Queries, keys, values, gate and up give a rank its own heads and columns; the output of attention
and down multiply them by the columns that belong to them, and the sum over all ranks is what one
process would have. Embedding, head, norms and routers are on all ranks.

A row of a down matrix in `tq1_0_strided` has B bytes, and byte j holds the weights j, B + j, ...,
4 B + j. So bytes a to b of all rows are rows of a matrix in the same layout, of 5 (b - a) columns.
These are the rows n B + a to n B + b, for n from 0 to 4, of gate and up. Where B bytes have room
for more weights than there are, no rows of gate and up belong to the last ones: they get zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from outlier_mlx.engine.distributed.cuts import Cut, Run, spans
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.description import Description
from outlier_mlx.runtime.affine2 import ROW_MULTIPLE, TRITS_PER_BYTE, row_bytes
from outlier_mlx.storage.safetensors import TensorRef

#: Families whose attention and FFN have these names in mlx-lm, and nothing that mixes heads.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ATTENTION, FFN, SHARED, SWITCH = "self_attn", "mlp", "mlp.shared_expert", "mlp.switch_mlp"
# Five trits 0.
_ZERO_TRITS = 128


def check_family(config: Description, families: Sequence[str]) -> None:
    """Check that models of a type can be divided.

    Raises:
        OutlierError: they cannot.
    """
    if config.family not in families and config.model_type not in families:
        raise OutlierError(
            f"a model of the type {config.model_type} cannot be split over ranks: only tiers, and"
            f" models of the types {', '.join(families)}, can"
        )


@dataclass(frozen=True)
class Heads:
    """A rank's attention heads, and the heads of keys and values that they read.

    Some ranks have the same head of keys and values if there are fewer of these than ranks.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]

    @property
    def counts(self) -> tuple[int, int]:
        """Number of heads, and of heads of keys and values."""
        return self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]


def heads_of(rank: int, size: int, heads: int, kv_heads: int) -> Heads:
    """The heads of a rank.

    Args:
        rank: its number.
        size: number of ranks.
        heads: heads of the model.
        kv_heads: its heads of keys and values, which divide the heads.

    Raises:
        OutlierError: there are fewer heads than ranks.
    """
    if heads < size:
        raise OutlierError(
            f"{heads} attention heads cannot be split over {size} ranks: use --pipeline, or"
            f" {heads} ranks at most"
        )
    group = heads // kv_heads
    if kv_heads >= size:
        start, stop = spans(kv_heads, size)[rank]
        return Heads((start * group, stop * group), (start, stop))
    # Neighbouring ranks share a head of keys and values, and split the heads that read it.
    for head, (first, after) in enumerate(spans(size, kv_heads)):
        if first <= rank < after:
            start, stop = spans(group, after - first)[rank - first]
            return Heads((head * group + start, head * group + stop), (head, head + 1))
    raise AssertionError("every rank has a head")


@dataclass(frozen=True)
class Columns:
    """Columns of a matrix whose product is summed over the ranks.

    Attributes:
        start: the first.
        stop: the one after the last.
        before: columns before them that are stored with them, since a group is not divided.
        after: those after them.
    """

    start: int
    stop: int
    before: int = 0
    after: int = 0

    @classmethod
    def of_groups(cls, start: int, stop: int, total: int, group: int) -> "Columns":
        """Columns of a matrix of `total` columns that is quantized in groups."""
        first, last = start // group * group, min(total, -(-stop // group) * group)
        return cls(start, stop, start - first, last - stop)

    @property
    def width(self) -> int:
        """Number of all that are stored."""
        return self.before + self.stop - self.start + self.after

    def cut(self, stored: int, total: int) -> Cut:
        """These columns of an array that has `stored` values for `total` columns."""
        first, last = self.start - self.before, self.stop + self.after
        return Cut.span(-1, first * stored // total, last * stored // total)


class TensorParallel:
    """What a rank has of a model.

    Attributes:
        stored: the tensors of the whole model, by name.
        heads: its heads.
        cuts: parts of tensors by name; it has the others as a whole.
        columns: columns of matrices whose products are summed, by path.
        expert_width: columns that it has of each expert; None: there are no packed ones.
    """

    def __init__(
        self, tensors: Mapping[str, TensorRef], config: Description, rank: int, size: int
    ) -> None:
        """Split a model.

        Args:
            tensors: the model's.
            config: what its config says.
            rank: number of the rank.
            size: number of ranks.

        Raises:
            OutlierError: the model cannot be split over so many ranks.
        """
        check_family(config, FAMILIES)
        rows = (name for name, tensor in tensors.items() if tensor.dtype == "U8")
        if any(f".{SWITCH}." not in name for name in rows):
            # A head's columns of the output of attention are no range of bytes.
            raise OutlierError("a ternary model is divided by layers alone: use --pipeline")
        assert config.heads and config.head_dim
        self.stored, self._rank, self._size = tensors, rank, size
        self.heads = heads_of(rank, size, config.heads, config.kv_heads or config.heads)
        self.cuts: dict[str, Cut] = {}
        self.columns: dict[str, Columns] = {}
        self.expert_width: int | None = None
        self._head_dim = config.head_dim
        for path in self._paths(f".{ATTENTION}.o_proj.weight"):
            self._split_attention(path)
        for part in (FFN, SHARED):
            for path in self._paths(f".{part}.down_proj.weight"):
                self._split_ffn(path)
        for path in self._paths(f".{SWITCH}.down_proj.weight"):
            self._split_experts(path, config.expert_width or 0)

    def shapes(self) -> dict[str, TensorRef]:
        """The tensors in the shapes that this rank has; they are not for reading."""
        found = dict(self.stored)
        for name, cut in self.cuts.items():
            found[name] = replace(found[name], shape=cut.shape(found[name].shape))
        return found

    def config(self, config: Description) -> Description:
        """The description of what this rank has."""
        heads, kv_heads = self.heads.counts
        width = self.expert_width or config.expert_width
        dense = config.intermediate
        if dense is not None:
            dense = -(-dense // self._size)
        return replace(
            config, heads=heads, kv_heads=kv_heads, expert_width=width, intermediate=dense
        )

    def _paths(self, end: str) -> list[str]:
        """Paths of what is before `.down_proj` or `.o_proj` in the names of tensors."""
        return [
            name.rpartition(".")[0].rpartition(".")[0] for name in self.stored if name.endswith(end)
        ]

    def _split_attention(self, path: str) -> None:
        width = self._head_dim
        start, stop = (head * width for head in self.heads.queries)
        self._rows(f"{path}.q_proj", Cut.span(-2, start, stop))
        for name in ("k_proj", "v_proj"):
            self._rows(f"{path}.{name}", Cut.span(-2, *(head * width for head in self.heads.keys)))
        total = self.stored[f"{path}.q_proj.weight"].shape[0]
        self._columns(f"{path}.o_proj", start, stop, total)

    def _split_ffn(self, path: str) -> None:
        total = self.stored[f"{path}.gate_proj.weight"].shape[-2]
        group = self._group(f"{path}.down_proj", total)
        self._check_width(path, total)
        start, stop = spans(total, self._size, group)[self._rank]
        for name in ("gate_proj", "up_proj"):
            self._rows(f"{path}.{name}", Cut.span(-2, start, stop))
        self._columns(f"{path}.down_proj", start, stop, total)

    def _split_experts(self, path: str, width: int) -> None:
        stored = self.stored[f"{path}.down_proj.weight"]
        if stored.dtype != "U8":
            self._split_ffn(path)
            columns = self.columns[f"{path}.down_proj"]
            if columns.before or columns.after:
                raise OutlierError(f"{path}: has fewer groups of columns than {self._size} ranks")
            return
        nbytes = row_bytes(width)
        self._check_width(path, nbytes)
        start, stop = spans(nbytes, self._size, ROW_MULTIPLE)[self._rank]
        own = -(-(stop - start) // ROW_MULTIPLE) * ROW_MULTIPLE
        self.expert_width = TRITS_PER_BYTE * own
        runs = tuple(
            Run(n * nbytes + start, min(n * nbytes + stop, width), n * own)
            for n in range(TRITS_PER_BYTE)
            if n * nbytes + start < width
        )
        for name in ("gate_proj", "up_proj"):
            self.cuts[f"{path}.{name}.weight"] = Cut(-2, runs, self.expert_width, _ZERO_TRITS)
            self.cuts[f"{path}.{name}.scales"] = Cut(-1, runs, self.expert_width)
        self.cuts[f"{path}.down_proj.weight"] = Cut(-1, (Run(start, stop),), own, _ZERO_TRITS)

    def _check_width(self, path: str, width: int) -> None:
        if width < self._size:
            raise OutlierError(f"{path}: its width cannot be split over {self._size} ranks")

    def _rows(self, path: str, rows: Cut) -> None:
        """Rows of a matrix that may be quantized, or have a bias."""
        for leaf in ("weight", "scales", "biases"):
            if f"{path}.{leaf}" in self.stored:
                self.cuts[f"{path}.{leaf}"] = rows
        if f"{path}.bias" in self.stored:
            self.cuts[f"{path}.bias"] = replace(rows, axis=-1)

    def _columns(self, path: str, start: int, stop: int, total: int) -> None:
        """Columns of a matrix that may be quantized."""
        columns = Columns.of_groups(start, stop, total, self._group(path, total))
        self.columns[path] = columns
        for leaf in ("weight", "scales", "biases"):
            tensor = self.stored.get(f"{path}.{leaf}")
            if tensor is not None:
                self.cuts[f"{path}.{leaf}"] = columns.cut(tensor.shape[-1], total)

    def _group(self, path: str, total: int) -> int:
        """Columns that share a scale; 1: the matrix is not quantized."""
        scales = self.stored.get(f"{path}.scales")
        return 1 if scales is None else total // scales.shape[-1]

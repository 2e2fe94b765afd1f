"""How much memory the experts of a model may take, and how many slots that is."""

import re
from dataclasses import dataclass

from outlier_mlx.errors import OutlierError
from outlier_mlx.terminal import size

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TEXT = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kKmMgG]i?[bB]|%)")


@dataclass(frozen=True)
class Experts:
    """The experts of a model that can be paged.

    Attributes:
        layers: MoE layers.
        count: experts of a layer.
        top_k: experts that a token uses in a layer.
        slot_nbytes: bytes of a slot, which holds one expert.
    """

    layers: int
    count: int
    top_k: int
    slot_nbytes: int

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return self.layers * self.count

    @property
    def floor(self) -> int:
        """The least number of slots: `top_k` a layer, and room for all experts of one layer."""
        return min(self.total, max(self.top_k * self.layers, self.count))


@dataclass(frozen=True)
class ExpertMemory:
    """How much memory experts may take: bytes, a share of all experts, or slots.

    Without any of them, it is what the plan finds best (`AUTO`).

    Attributes:
        nbytes: bytes of all slots together, at most.
        share: share of all experts, above 0 and at most 1.
        slots: number of slots.
    """

    nbytes: int | None = None
    share: float | None = None
    slots: int | None = None

    @classmethod
    def parse(cls, text: str) -> "ExpertMemory":
        """Read "4GB" or "512MB" (powers of 1000), "4GiB" (of 1024), "50%", "all" or "auto".

        Raises:
            OutlierError: the text is none of these.
        """
        word = text.strip()
        if word.lower() in ("all", "auto"):
            return ALL if word.lower() == "all" else AUTO
        found = _TEXT.fullmatch(word)
        unit = found[2].upper() if found else ""
        number = float(found[1]) if found else 0.0
        if unit == "%" and 0 < number <= 100:
            return cls(share=number / 100)
        if unit in _UNITS and number > 0:
            return cls(nbytes=int(number * _UNITS[unit]))
        raise OutlierError(
            f"{text[:30]!r} is no amount of memory: expected one such as 4GB, 4GiB, 512MB or 50%,"
            " or all, or auto"
        )

    def slots_for(self, experts: Experts) -> int | None:
        """The number of slots, for anything but `AUTO`.

        Args:
            experts: the model's.

        Returns:
            None if all experts have a slot: they are then loaded without paging.

        Raises:
            OutlierError: there are fewer slots than the model needs.
        """
        if self.slots is not None:
            found = self.slots
        elif self.share is not None:
            found = int(self.share * experts.total + 1e-9)
        else:
            found = (self.nbytes or 0) // experts.slot_nbytes
        if found >= experts.total:
            return None
        if found < experts.floor:
            raise OutlierError(f"{self}: too little memory for experts: {least(experts)}")
        return found

    def __str__(self) -> str:
        """As it is given on a command line."""
        if self == ALL:
            return "all"
        if self.slots is not None:
            return f"{self.slots} slots"
        if self.share is not None:
            return f"{100 * self.share:g}%"
        return "auto" if self.nbytes is None else size(self.nbytes).replace(" ", "")


#: All experts are loaded; nothing is paged.
ALL = ExpertMemory(share=1.0)
#: As many as memory allows.
AUTO = ExpertMemory()


def least(experts: Experts) -> str:
    """A sentence about the least memory for a model's experts, with the option that gives it."""
    nbytes = experts.floor * experts.slot_nbytes
    if experts.floor == experts.count > experts.top_k * experts.layers:
        why = f"all {experts.count} of a layer"
    else:
        why = f"{experts.top_k} in each of {experts.layers} layers"
    return (
        f"the model needs {experts.floor} of its {experts.total} experts in memory at least"
        f" ({why}): --expert-memory {-(-nbytes // 10**6)}MB"
    )

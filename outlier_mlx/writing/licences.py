"""Licences: what the model cards of a tier's sources state; nothing is ever assumed."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import parse_yaml

CARD = "README.md"
# Characters of a card that are looked at: the YAML at its head is far shorter, and slow to parse.
_CARD_CHARACTERS = 1 << 16
# Characters of an identifier, name or link, at most.
_MAX_LENGTH = 300


@dataclass(frozen=True)
class Licence:
    """A licence in a model card of the hub.

    Attributes:
        ids: identifiers of the hub, such as "apache-2.0", or "other"; at least one.
        name: `license_name`, which goes with "other".
        link: `license_link`: an address, or a file beside the card.
    """

    ids: tuple[str, ...]
    name: str | None = None
    link: str | None = None

    def as_json(self) -> dict:
        """The fields of a model card; those that are not stated are left out."""
        ids = self.ids[0] if len(self.ids) == 1 else list(self.ids)
        fields = {"license": ids, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in fields.items() if value is not None}


def licence_of(metadata: dict) -> Licence | None:
    """The licence in a model card's metadata, or in a manifest's entry of a source."""
    stated = metadata.get("license")
    ids = [_text(value) for value in (stated if isinstance(stated, list) else [stated])]
    known = tuple(dict.fromkeys(value for value in ids if value is not None))
    if not known or len(known) > 8:
        return None
    return Licence(known, _text(metadata.get("license_name")), _text(metadata.get("license_link")))


def card_metadata(folder: Path) -> dict | None:
    """The YAML at the head of a folder's model card: empty if there is none, None if unreadable."""
    if not (folder / CARD).is_file():
        return {}
    try:
        with inside(folder, CARD).open(encoding="utf-8-sig", errors="replace") as file:
            lines = file.read(_CARD_CHARACTERS).lstrip().splitlines()
    except OSError:
        return None
    if not lines or lines[0].rstrip() != "---":
        return {}
    try:
        end = next(n for n, line in enumerate(lines[1:], 1) if line.rstrip() == "---")
        metadata = parse_yaml("\n".join(lines[1:end]), CARD)
    except (StopIteration, CheckpointError):
        return None
    return metadata if isinstance(metadata, dict) else {}


def stated_licence(folder: Path) -> Licence | None:
    """The licence in a folder's model card; None if there is no card, or it states none.

    A card whose metadata cannot be read counts as silent, with a warning.
    """
    metadata = card_metadata(folder)
    if metadata is None:
        warnings.warn(
            f"{folder.name}: {CARD}: its metadata cannot be read, so its licence is not known",
            CheckpointWarning,
            stacklevel=2,
        )
        return None
    return licence_of(metadata)


def combine(stated: Sequence[Licence | None], given: str | None = None) -> Licence | None:
    """The licence of a model that is made from several sources: all of their licences.

    Args:
        stated: one a source.
        given: the identifier for sources that state none.

    Returns:
        None if a source states no licence and none is given for it.
    """
    licences = [one or (Licence((given,)) if given else None) for one in stated]
    known = [one for one in licences if one is not None]
    if len(known) < len(licences) or not known:
        return None
    ids = tuple(dict.fromkeys(value for one in known for value in one.ids))
    details = {(one.name, one.link) for one in known if one.name or one.link}
    # A card has room for one name and link; with several, its text has them.
    name, link = details.pop() if len(details) == 1 else (None, None)
    return Licence(ids, name, link)


def _text(value: object) -> str | None:
    if not isinstance(value, str) or not value.isprintable() or len(value) > _MAX_LENGTH:
        return None
    return value.strip() or None

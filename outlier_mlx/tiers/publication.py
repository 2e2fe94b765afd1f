"""What `push` will publish: verified and collected before the hub is asked anything."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.checkpoints.overlay_card import is_upcycled, overlay_card, upcycled_origins
from outlier_mlx.errors import CheckpointError, CheckpointWarning, OutlierError, listed
from outlier_mlx.measure.eval_results import Evaluation
from outlier_mlx.measure.measured import read_measured
from outlier_mlx.models.config import is_ternary_model, raw_config
from outlier_mlx.storage.paths import entries, inside
from outlier_mlx.storage.texts import read_bytes, read_json
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.tiers.card import model_card, origins
from outlier_mlx.tiers.ternary_card import imported_origins, ternary_card
from outlier_mlx.tiers.verify import verify_tier
from outlier_mlx.writing.assets import is_legal
from outlier_mlx.writing.card import Origin
from outlier_mlx.writing.licences import CARD
from outlier_mlx.writing.manifest import MEASUREMENTS, Manifest, read_manifest

#: The manifests of what may be published: a tier's, and that of an imported ternary model or of an
#: overlay that was trained.
MANIFEST, IMPORTED = "tier.json", "checksums.json"


@dataclass(frozen=True)
class Upload:
    """A file as it will be in the repository.

    Attributes:
        name: its path there.
        content: its bytes, or the file that has them.
        nbytes: how many.
        sha256: SHA-256 of its bytes, in hexadecimal digits.
    """

    name: str
    content: Path | bytes
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Publication:
    """What will be published, and where.

    Attributes:
        repo: OWNER/NAME.
        private: whether a new repository is to be private; an existing one has to be.
        manifest: the tier's, or the model's.
        uploads: by name, the card among them.
    """

    repo: str
    private: bool
    manifest: dict
    uploads: dict[str, Upload]

    @property
    def card(self) -> str:
        """The model card."""
        content = self.uploads[CARD].content
        assert isinstance(content, bytes)
        return content.decode("utf-8")

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(upload.nbytes for upload in self.uploads.values())


def check_repo_name(repo: str) -> None:
    """Check that a name is one that the hub's repositories can have.

    Raises:
        OutlierError: it is not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        known = repo.count("/") == 1
    except HFValidationError:
        known = False
    if not known:
        raise OutlierError(f"{repo!r} is not the name of a hub repository (OWNER/NAME)")


def prepare(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    licence: str | None = None,
    card: str | None = None,
    evaluations: Sequence[Evaluation] = (),
    progress: Progress = no_progress,
) -> Publication:
    """Verify a model, and collect what will be published; the hub is not asked.

    That is what the manifest lists, the manifest, a card, licence files, and what was measured:
    nothing else that may lie in the folder.

    Args:
        folder: the tier, the ternary model that was imported, or the overlay that was trained.
        repo: OWNER/NAME.
        private: whether the repository is private.
        licence: the hub's identifier of the licence of sources whose cards state none.
        card: a model card in place of the one that is written for the tier.
        evaluations: scores for the card.
        progress: called with bytes verified so far, and in all.

    Raises:
        CheckpointError: the folder is none of these, or is damaged.
        OutlierError: the name is none, there are scores of an overlay, or a source's licence is not
            known and `private` not set.
    """
    check_repo_name(repo)
    name = _manifest_of(folder)
    _check_licences(folder, name, private, licence)
    verify_tier(folder, progress)
    manifest = read_manifest(folder, name)
    uploads = {
        name: Upload(name, inside(folder, name), nbytes, digest)
        for name, (digest, nbytes) in manifest.files.items()
    }
    beside = [name, *(path.name for path in entries(folder) if is_legal(path.name))]
    if read_measured(folder):
        beside.append(MEASUREMENTS)
    contents = {name: read_bytes(inside(folder, name)) for name in beside}
    contents[CARD] = (card or _card(folder, manifest, repo, licence, evaluations)).encode("utf-8")
    for name, content in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        uploads[name] = Upload(name, content, len(content), digest)
    return Publication(repo, private, manifest.content, dict(sorted(uploads.items())))


def _manifest_of(folder: Path) -> str:
    """The name of the manifest of what is in a folder.

    Raises:
        CheckpointError: there is no such folder, or it is neither a tier, nor a ternary model that
            was imported, nor an overlay that was trained.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / MANIFEST).exists():
        return MANIFEST
    if (folder / IMPORTED).exists() and (
        is_ternary_model(raw_config(folder)) or is_upcycled(read_json(inside(folder, IMPORTED)))
    ):
        return IMPORTED
    raise CheckpointError(
        f"{folder}: not a tier: no {MANIFEST}; nor an imported ternary model, nor an overlay that"
        " upcycle wrote"
    )


def _card(
    folder: Path,
    manifest: Manifest,
    repo: str,
    licence: str | None,
    evaluations: Sequence[Evaluation],
) -> str:
    if not is_upcycled(manifest.content):
        made = model_card if manifest.name == MANIFEST else ternary_card
        return made(folder, repo, licence, evaluations)
    if evaluations:
        raise OutlierError(
            f"{folder}: an overlay has no scores of its own: push its tier with them"
        )
    return overlay_card(folder, repo, licence)


def _origins(manifest: dict, name: str) -> list[Origin]:
    if name == MANIFEST:
        return origins(manifest)
    return upcycled_origins(manifest) if is_upcycled(manifest) else imported_origins(manifest)


def _check_licences(folder: Path, name: str, private: bool, licence: str | None) -> None:
    """Refuse to publish if the licence of a source is not known."""
    manifest = read_json(inside(folder, name))
    sources = _origins(manifest, name)
    silent = [f"the {source.role} {source.name!r}" for source in sources if source.licence is None]
    if licence is not None and not silent:
        stated = listed(value for one in sources if one.licence for value in one.licence.ids)
        raise OutlierError(
            f"{folder}: the model cards of its sources state their licences ({stated}); the model's"
            " is not another"
        )
    if silent and licence is None:
        unknown = f"no licence is known for {listed(silent)}"
        if not private:
            raise OutlierError(
                f"{folder}: {unknown}, and none is assumed: --license ID names it, or --private"
                " keeps the repository to yourself"
            )
        warnings.warn(f"{unknown}; the card says so", CheckpointWarning, stacklevel=3)

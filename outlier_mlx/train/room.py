"""What a training takes on the disk: checked before it begins."""

from pathlib import Path

from outlier_mlx.models.description import ModelConfig
from outlier_mlx.storage.paths import entries
from outlier_mlx.train.overlay import overlay_bytes
from outlier_mlx.train.settings import Settings
from outlier_mlx.train.teacher import LIKELIEST
from outlier_mlx.train.texts import Corpora
from outlier_mlx.writing.folders import check_space

# Bytes of a weight in the state of a running stage: it, and Adam's two averages, in float32; and of
# a sum over what the base sees, before. The state is written whole beside the one before.
_RUNNING, _SEEN = 2 * 12, 2 * 4
# Bits of a weight in what a finished stage leaves, and what begins and ends all of them.
_FINISHED = 3 * 2
# Bytes of a likely token and of its probability.
_PREDICTED = 8


def check_room(
    config: ModelConfig,
    settings: Settings,
    corpora: Corpora,
    target: Path,
    work: Path,
    *,
    teacher: bool,
) -> None:
    """Check that the disk has room for an overlay, and for what its training keeps.

    Args:
        config: the base's.
        settings: with nothing open but `layers_at_once`.
        corpora: what is trained on.
        target: the folder of the overlay.
        work: the work folder.
        teacher: whether a teacher's predictions are kept, too.

    Raises:
        OutlierError: it has not.
    """
    check_space(target, overlay_bytes(config, settings, len(corpora.domains)), "the overlay")
    nbytes = work_bytes(config, settings, corpora, teacher=teacher)
    kept = entries(work, "*.safetensors") if work.exists() else []
    there = sum(path.stat().st_size for path in kept)
    check_space(work, max(0, nbytes - there), "the state of the training")


def work_bytes(config: ModelConfig, settings: Settings, corpora: Corpora, *, teacher: bool) -> int:
    """Bytes that the work folder takes, at most; see `check_room`."""
    assert settings.layers is not None and settings.expert_size is not None
    layers, domains = len(settings.layers), len(corpora.domains)
    one = 3 * config.hidden * settings.expert_size * settings.experts_per_domain
    at_once = min(layers, settings.layers_at_once or layers)
    running = max(at_once, layers * domains * settings.joint_weights)
    sums = config.hidden**2 + domains * (config.hidden + config.intermediate)
    nbytes = max(_RUNNING * one * running, _SEEN * sums * layers)
    nbytes += one * layers * domains * _FINISHED // 8
    if teacher:
        nbytes += sum(corpus.tokens for corpus in corpora.domains) * LIKELIEST * _PREDICTED
    return nbytes

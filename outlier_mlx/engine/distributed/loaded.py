"""The classes of the model that a process loads: all of a model, or what a rank has of it."""

from pathlib import Path

from outlier_mlx.engine.distributed.ranks import gathered, ranks
from outlier_mlx.engine.plan import Plan
from outlier_mlx.engine.quantized import Classes


def classes_to_load(
    usual: Classes, concrete: Classes, folder: Path, planned: Plan, *, always_page: bool = False
) -> Classes:
    """The classes for `mlx_lm.utils.load_model`.

    Args:
        usual: those of a whole model in memory.
        concrete: the same ones, as others can inherit from them.
        folder: the model's.
        planned: whether experts are paged.
        always_page: page them even if all have a slot.

    Raises:
        OutlierError: the model cannot be split over the ranks.
    """
    paged, own = always_page or planned.slots is not None, ranks()
    if own.size == 1 and not paged:
        return usual
    classes = concrete
    if paged:
        from outlier_mlx.engine.paging.paged import paged_classes

        classes = paged_classes(classes, folder, planned, always=always_page)
    if own.size > 1:
        from outlier_mlx.engine.distributed.classes import partial_classes
        from outlier_mlx.engine.distributed.failures import stay_in_step
        from outlier_mlx.engine.distributed.pipeline import pipeline_classes
        from outlier_mlx.engine.distributed.split_model import split_classes

        if own.pipeline:
            classes = pipeline_classes(classes, folder, own)
        else:
            classes = split_classes(classes, folder, own, paged=paged)
        # All of one rank's experts may fit, and not those of another.
        if any(gathered("paged" if paged else "")):
            classes = partial_classes(classes, lambda *_: None, stay_in_step)
    return classes

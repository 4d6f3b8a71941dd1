"""The measures of results that were written before a result described its own.

Results of today bring their measures along (``measures`` in ``result.json``), and nothing is added here for them.
"""

from .measures import Measure

__all__ = ["OLDER_MEASURES"]

_AVERAGE_PRECISION = (
    Measure("AP", "AP"),
    Measure("AP50", "AP50"),
    Measure("AP75", "AP75"),
    Measure("APS", "AP small", part="small objects"),
    Measure("APM", "AP medium", part="medium objects"),
    Measure("APL", "AP large", part="large objects"),
)
_PANOPTIC_QUALITY = tuple(
    Measure(f"{name}{suffix}", f"{name}{suffix.replace('_', ' ')}", part=suffix[1:] if name == "PQ" else "")
    for suffix in ("", "_things", "_stuff")
    for name in ("PQ", "SQ", "RQ")
)

OLDER_MEASURES = (
    Measure("top1", "top-1"),
    Measure("top5", "top-5"),
    Measure("many", "many", part="many-shot classes"),
    Measure("medium", "medium", part="medium-shot classes"),
    Measure("few", "few", part="few-shot classes"),
    Measure("macro_f1", "macro F1"),
    Measure("ece", "ECE", higher_is_better=False),
    Measure("share_of_experts_used", "share of experts used", higher_is_better=False),
    Measure("accuracy", "accuracy"),
    *_AVERAGE_PRECISION,
    *_PANOPTIC_QUALITY,
    *(Measure(f"{kind}_{name}", f"{kind} {name}") for kind in ("mask", "box") for name in ("AP", "AP50")),
)
"""All metrics of long-tailed recognition, detection and panoptic segmentation, in the order of the tables."""

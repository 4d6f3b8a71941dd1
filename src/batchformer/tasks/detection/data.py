"""Detection data: COCO's instances as published, or the scenes."""

from batchformer.tasks.set_prediction.coco_data import CocoData

__all__ = ["DetectionData"]


class DetectionData(CocoData):
    """See `CocoData`: boxes of instances."""

"""Detection data: boxes of instances in COCO's format, or the scenes."""

from batchformer.tasks.set_prediction.coco_data import CocoData

__all__ = ["DetectionData"]


class DetectionData(CocoData):
    """Batches with the boxes of instances; see `CocoData`."""

"""Room of detection and panoptic segmentation: detectors, matching, loss, average precision, data in COCO's format."""

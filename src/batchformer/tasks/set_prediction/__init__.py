"""What detection and panoptic segmentation share: matching of predictions to targets and its loss."""

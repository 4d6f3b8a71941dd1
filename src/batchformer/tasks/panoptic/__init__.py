"""Panoptic segmentation: a detector on things and stuff, then a mask head on it."""

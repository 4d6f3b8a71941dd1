"""Checkpoints and networks that the official code of the DETR family has published."""

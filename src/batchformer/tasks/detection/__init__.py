"""Object detection with DETR, Conditional DETR, Deformable DETR and SMCA."""

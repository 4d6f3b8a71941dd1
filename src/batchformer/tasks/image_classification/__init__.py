"""Image data, backbones, networks, metrics and prediction that all tasks on images with class labels share."""

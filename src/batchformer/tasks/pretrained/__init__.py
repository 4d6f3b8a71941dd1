"""Networks with weights from elsewhere, and the features that frozen ones compute: shared by all tasks on images."""

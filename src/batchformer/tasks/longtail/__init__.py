"""Long-tailed recognition: few classes with many images, many classes with few."""

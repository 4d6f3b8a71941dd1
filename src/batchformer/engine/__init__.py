"""From a recipe to runs, and from runs to a comparison. Lightning's Trainer does the training."""

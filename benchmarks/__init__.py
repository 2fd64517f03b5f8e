"""What a round costs beside the training: see README.md."""

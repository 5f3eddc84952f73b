"""What medgen does: train, augment, score, convert; each a function that returns what it wrote."""

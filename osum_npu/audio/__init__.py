"""Sound: reading files, log-mel features, augmentation."""

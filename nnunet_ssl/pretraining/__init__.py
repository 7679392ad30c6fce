"""From a corpus of unlabelled scans to a checkpoint."""

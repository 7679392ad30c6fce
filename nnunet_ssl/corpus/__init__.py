"""A corpus of unlabelled scans: found on disk, brought onto grids, stored, opened again."""

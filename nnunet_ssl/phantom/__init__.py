"""Synthetic multi-contrast brains, with and without lesions, in the on-disk layouts of the real data sets."""

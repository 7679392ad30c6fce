"""Measure a representation or a segmentation."""

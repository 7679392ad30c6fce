"""Self-supervised brain-MRI pre-training for stock nnU-Net v2."""

__version__ = "0.1.0"

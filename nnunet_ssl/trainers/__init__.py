"""nnU-Net trainers that start from a pre-trained encoder."""

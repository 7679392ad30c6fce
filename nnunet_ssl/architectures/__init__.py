"""What a network is: no training, no nnU-Net."""

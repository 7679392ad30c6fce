"""What the encoder is asked to do: pure losses and the heads they need."""

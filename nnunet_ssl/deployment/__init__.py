"""Trained models on other people's machines: in a container, without a network, on whatever image comes."""

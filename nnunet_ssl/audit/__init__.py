"""What a pre-training has seen of the data that it is tested on: by origin, by name, by content."""

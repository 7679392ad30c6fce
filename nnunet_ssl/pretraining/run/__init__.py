"""What a run leaves behind: checkpoints, records, pictures."""

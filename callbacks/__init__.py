"""What a run does besides training: record metrics, keep checkpoints, resume exactly, stop."""

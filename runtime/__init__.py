"""What every run needs and no algorithm owns: configuration, checkpoints, the run folder."""

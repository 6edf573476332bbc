"""What one can ask of a run: `mode=NAME` calls `run` of `modes/NAME.py`."""

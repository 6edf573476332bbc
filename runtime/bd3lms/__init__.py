"""Checkpoints of the program bd3lms: read without running what is pickled in them, and written."""

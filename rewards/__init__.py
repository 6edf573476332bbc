"""Turning text into a verdict: graders, and the sandbox that runs programs nobody has read."""

"""Speed and memory, each measured beside a straightforward implementation of the same step."""

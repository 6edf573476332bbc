"""The mathematics: pure functions on tensors. Imports nothing but torch and its annotations."""

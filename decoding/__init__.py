"""Turning a model into text: which positions to predict next, which tokens to put there."""

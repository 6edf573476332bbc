"""Turning rows into numbers: rates, likelihoods, and the intervals that belong to them."""

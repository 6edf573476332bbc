"""Drafts as folders that other programs load: written, and read without trust."""

"""Turning files into rows: sources, tokenizers, packing, the token cache, and the order of rows."""

"""Attention over the paged KV cache: the seam to transformers (`base`), and one backend a module."""

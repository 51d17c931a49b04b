"""Continuous batching over one transformers model: ids in, ids out. Knows no Ray, no HTTP and no text."""

"""Anthropic's messages: the wire format of its clients. No HTTP, no replica."""

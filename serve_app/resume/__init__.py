"""Streams that outlive their connection: one owner writes a journal, anybody who may reads it."""

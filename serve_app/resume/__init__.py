"""Streams that outlive their connection: one owner writes a journal, any authorized client can read it."""

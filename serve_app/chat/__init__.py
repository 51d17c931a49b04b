"""Messages to ids and ids to text."""

"""The serve-app command: one module per subcommand, and what they share."""

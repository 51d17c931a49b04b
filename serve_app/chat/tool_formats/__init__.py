"""How models write tool calls: one module for each family of formats."""

"""The way of a request to a model replica and of its tokens back."""

"""serve_app: a Ray Serve application that streams chat answers from a Hugging Face transformers model."""

__version__ = "0.1.0"

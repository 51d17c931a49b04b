"""gRPC: the service of proto/serve_app.proto, the call of Jina's client, and health checks, on the HTTP application."""

"""Ray Serve's own schema of a config file, for packages of serve_app that validate one and may not import ray."""

from ray.serve.schema import ServeDeploySchema

__all__ = ["ServeDeploySchema"]

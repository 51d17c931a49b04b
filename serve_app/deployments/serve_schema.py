"""Ray Serve's own schema of a config file, for whoever validates one: only this room may import ray."""

from ray.serve.schema import ServeDeploySchema

__all__ = ["ServeDeploySchema"]

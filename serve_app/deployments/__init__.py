"""The deployments that Ray Serve runs. Only this package and `app` import ray."""

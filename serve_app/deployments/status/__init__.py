"""How far a deployment is: progress, readiness, the banner."""

"""One completion: a request resolved, run on replicas, told as text. No HTTP, no Ray."""

"""One completion: a request is resolved, run on replicas and turned into text. No HTTP, no Ray."""

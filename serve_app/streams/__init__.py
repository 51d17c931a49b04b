"""One client-visible stream over one or more attempts on replicas."""

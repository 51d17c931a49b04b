"""serve_app beside what a user would pick instead: `make compare`."""

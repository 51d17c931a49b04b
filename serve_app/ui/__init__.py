"""What the service shows in a browser: pages, and the files of others that they use."""

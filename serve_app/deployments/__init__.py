"""What Ray Serve runs; the only importers of ray."""

"""HTTP itself: endpoints, bodies, server-sent events, middleware. Knows no wire format."""

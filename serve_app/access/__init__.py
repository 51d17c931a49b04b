"""Who may ask, how much, and when: keys, tenants, limits, the queue of those who wait. Knows no wire format."""

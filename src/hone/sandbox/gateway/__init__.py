"""A gateway: many nodes behind one address."""

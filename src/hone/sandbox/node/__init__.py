"""A node: leases on the sandboxes of one machine, their state and network, and its books."""

"""A node: leases on the sandboxes of one machine, and its books."""

"""Turns rollouts into training batches: the decisions, the ledger that survives a crash, and the process around them."""

"""Runs programs nobody trusts: cells of this machine, nodes of many cells, and a gateway in front of many nodes."""

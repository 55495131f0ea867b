"""Environments run without training: avg@k and pass@k with confidence intervals, resumable, as files and tables."""

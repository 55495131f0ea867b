"""Structured logs, metrics, spans and progress of every process of a run."""

"""Verifiers: code that checks an answer."""

"""Spawner, agent and the library of warm Pythons in C, and their build."""

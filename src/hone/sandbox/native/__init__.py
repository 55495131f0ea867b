"""The two small programs in C that make cells and live in them, their build, and the same in Python."""

"""TOML files and --a.b=c to one frozen tree, and back to a file."""

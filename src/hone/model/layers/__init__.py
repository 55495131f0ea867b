"""The kinds of layer that the transformer is built from, one file each."""

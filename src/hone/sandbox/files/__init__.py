"""The files of sandboxes: reached beneath their roots, packed and unpacked, layered."""

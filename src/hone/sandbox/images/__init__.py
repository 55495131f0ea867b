"""Images: the root file systems of sandboxes, from folders, archives, registries and short recipes."""

"""Training data made from environments."""

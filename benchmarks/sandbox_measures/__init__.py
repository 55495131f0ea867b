"""What `sandboxes.py` measures, one module for each kind of claim."""

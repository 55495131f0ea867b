"""Programs of ours that run in sandboxes, or on their way into one; they import the standard library only."""

"""Programs that run as processes of their own, around and inside sandboxes: standard library only, nothing of ours."""

"""What sandboxes may reach, the proxy that keeps to it, and the ports that their programs listen at."""

"""What sandboxes may reach, the proxy that keeps to it, and connections to the ports that their programs listen at."""

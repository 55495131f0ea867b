"""Other isolations than cells, one module each: what starts the agent, and behind what."""

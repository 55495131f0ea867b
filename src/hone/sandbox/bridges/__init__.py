"""Ways in for programs that know another interface: SandboxFusion over HTTP, and the names of another SDK."""

"""Ways in for programs that know another interface, and code of any language."""

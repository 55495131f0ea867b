"""Pages about runs, made from nothing but a run's folder."""

"""From a recipe to processes: prepare the run's folder, plan the processes, keep them alive, run the stages in turn."""

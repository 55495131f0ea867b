"""The pipes between the processes of a run: addresses, the run's folder, training batches, weights."""

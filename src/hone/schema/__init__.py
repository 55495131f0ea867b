"""Everything that crosses a process boundary: messages, tasks, traces, batches, policies; and the wire they travel on."""

"""One model replica that schedules requests: paged KV cache, continuous batching, sampling, weights that change in flight."""

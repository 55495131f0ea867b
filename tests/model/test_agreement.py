"""Trainer and engine: packed rows and paged blocks of any cut give the same numbers."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hone.model import ops

BLOCK_SIZE, BLOCKS_PER_SEQUENCE = 4, 8


class PagedRun:
    """Feeds sequences in chunks through paged attention, as an engine does."""

    def __init__(self, model, sequences):
        config, count = model.config, len(sequences) * BLOCKS_PER_SEQUENCE
        shape = (count, BLOCK_SIZE, config.num_kv_heads, config.head_size)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(torch.int32)
        self.model, self.sequences = model, sequences
        self.caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]
        self.tables = order.view(len(sequences), BLOCKS_PER_SEQUENCE)
        self.done = [0] * len(sequences)
        self.logits = [[] for _ in sequences]

    def advance(self, chunks):
        """Run the next `chunks[s]` tokens of each sequence s that has a chunk, in one batch."""
        spans = [(s, self.done[s], self.done[s] + size) for s, size in chunks.items()]
        rows = [s for s, _, _ in spans]
        self.slots = torch.cat([self.slots_of(*span) for span in spans])
        self.starts = torch.tensor([0, *(end - start for _, start, end in spans)]).cumsum(0).to(torch.int32)
        self.contexts = torch.tensor([end for _, _, end in spans], dtype=torch.int32)
        self.rows = torch.tensor(rows)
        token_ids = torch.cat([self.sequences[s][start:end] for s, start, end in spans])
        positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
        logits = self.model.unembed(self.model(token_ids, positions, self.attend))
        for (s, _, end), part in zip(spans, logits.split(self.starts.diff().tolist()), strict=True):
            self.logits[s].append(part)
            self.done[s] = end

    def slots_of(self, s, start, end):
        positions = torch.arange(start, end)
        return self.tables[s, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE

    def attend(self, layer, q, k, v):
        keys, values = self.caches[layer]
        ops.write_cache(k, v, keys, values, self.slots)
        tables = self.tables[self.rows]
        return ops.paged_attention(q, keys, values, tables, self.starts, self.contexts, q.shape[-1] ** -0.5)


def run_paged(model, sequences, data):
    """Any interleaving of chunks that an engine might choose."""
    run = PagedRun(model, sequences)
    while remaining := {s: len(t) - run.done[s] for s, t in enumerate(sequences) if run.done[s] < len(t)}:
        chosen = data.draw(st.lists(st.sampled_from(sorted(remaining)), min_size=1, unique=True))
        run.advance({s: data.draw(st.integers(1, remaining[s])) for s in chosen})
    return torch.cat([torch.cat(parts) for parts in run.logits])


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_paged_chunks_give_the_logits_of_packed_rows(variant, random_model, pack, backend, data):
    model, packed = random_model(variant).requires_grad_(False), pack(11, 1, 30, 6)
    sequences = packed.token_ids.split(packed.starts.diff().tolist())

    paged = run_paged(model, sequences, data)
    model.requires_grad_(True)
    trained = packed.logits(model).detach()

    if backend == "native":
        assert torch.equal(paged, trained)
    else:
        torch.testing.assert_close(paged, trained, rtol=1e-4, atol=1e-4)

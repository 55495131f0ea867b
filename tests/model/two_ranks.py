"""One rank of `test_parallel`: sharded steps, whose losses and whole gradients rank 0 writes to a file.

Usage: two_ranks.py RANK WORLD_SIZE PORT MODEL_FOLDER OUT_FILE
"""

import datetime
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hone.model import checkpoint, ops, parallel
from hone.model.layers.attention import PackedAttention
from hone.model.tensors import whole

LENGTHS = ((9, 5), (3, 11))
TOKENS = torch.arange(28).reshape(2, 14) * 7 % 96


def part(rank):
    """The packed tokens of one of two ranks."""
    lengths = LENGTHS[rank]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return TOKENS[rank], positions, PackedAttention(starts, max(lengths))


def loss_of(model, rank):
    token_ids, positions, attend = part(rank)
    logits = model.unembed(model(token_ids, positions, attend))
    return -ops.token_logprobs(logits, token_ids.roll(-1), 1.0).sum()


def sharded_model(folder, world_size, checkpointed, compute_dtype=None):
    model = checkpoint.load_model(folder)
    model.activation_checkpointing = checkpointed
    return parallel.shard(model, init_device_mesh("cpu", (world_size,)), compute_dtype)


def step(model, rank, world_size):
    """The loss and the gradients of both ranks together; FSDP averages over ranks, the loss is a sum."""
    loss = loss_of(model, rank)
    loss.backward()
    dist.all_reduce(total := loss.detach())
    return total, {name: whole(p.grad) * world_size for name, p in model.named_parameters()}


def main(rank, world_size, port, folder, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    model = sharded_model(folder, world_size, checkpointed=False)
    model.count_expert_tokens()
    with torch.no_grad():
        dist.all_reduce(scored := loss_of(model, rank))
    counts = {layer: counts_E.sum().item() for layer, counts_E in model.take_expert_tokens().items()}
    seen = {"scored": scored, "counts": counts, "step": step(model, rank, world_size)}
    seen["recomputed"] = step(sharded_model(folder, world_size, checkpointed=True), rank, world_size)
    seen["in_bfloat16"], gradients = step(sharded_model(folder, world_size, False, torch.bfloat16), rank, world_size)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    seen["state"] = snapshot(model)
    seen["drawn"] = snapshot(model.initialize(seed=5))
    checkpoint.load_hugging_face_tensors(model, dict(checkpoint.hugging_face_tensors(seen["state"], model.config)))
    seen["reloaded"] = snapshot(model)
    if rank == 0:
        torch.save(seen, out)
    dist.barrier()
    dist.destroy_process_group()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in parallel.full_state(model).items()}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])

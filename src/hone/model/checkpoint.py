"""Models in the Hugging Face layout: config.json, sharded safetensors with an index, tokenizer files."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hone.model.families import ModelConfig
from hone.model.tensors import fill, whole
from hone.model.transformer import Transformer

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
GENERATION_FILE = "generation_config.json"
MAX_NAMES_SHOWN = 8


class CheckpointError(RuntimeError):
    """A model's files cannot be read or written; the message says which and why."""


def load_config(folder: Path | str) -> ModelConfig:
    """The model configuration of a folder."""
    return ModelConfig.from_hugging_face(_read_json(Path(folder) / "config.json"))


def load_model(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Transformer:
    """A model with the weights of a folder, cast to `dtype`."""
    folder = Path(folder)
    config = load_config(folder)
    model = Transformer(config).to(device=device, dtype=dtype)
    with _failures_name(folder), SafetensorsFolder(folder) as tensors:
        load_hugging_face_tensors(model, tensors)
    return model


def save_model(
    model_or_state: Transformer | Mapping[str, Tensor],
    config: ModelConfig,
    folder: Path | str,
    *,
    shard_bytes: int = 5_000_000_000,
    tokenizer_from: Path | str | None = None,
) -> None:
    """Write a folder that transformers, vLLM and `load_model` read; it appears complete or not at all."""
    folder = Path(folder)
    state = model_or_state.state_dict() if isinstance(model_or_state, Transformer) else model_or_state
    with _failures_name(folder), _replacing(folder) as unfinished:
        written = config.to_hugging_face() | {"dtype": _dtype_name(state)}
        _write_json(unfinished / "config.json", written)
        _write_json(unfinished / GENERATION_FILE, _generation_config(config))
        if tokenizer_from is not None:
            _copy_tokenizer(Path(tokenizer_from), unfinished)
        _write_shards(hugging_face_tensors(state, config), unfinished, shard_bytes)


def hugging_face_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dictionary under their Hugging Face names, one expert at a time."""
    for name, pieces in layout(config).items():
        if name not in state:
            raise ValueError(f"the state has no {name}, which the config of this {config.family} model asks for")
        tensor = whole(state[name])
        for piece in pieces:
            yield piece.name, tensor[piece.index]


def load_hugging_face_tensors(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Fill a model; names or shapes that do not fit its config are all listed in one ValueError."""
    pieces = layout(model.config)
    _check_fit([piece for stacked in pieces.values() for piece in stacked], tensors, model.config)
    targets = model.state_dict(keep_vars=True)
    for name, stacked in pieces.items():
        target = targets[name]
        if len(stacked) == 1:
            fill(target, tensors[stacked[0].name])
            continue
        value = torch.empty(target.shape, dtype=target.dtype)
        for piece in stacked:
            value[piece.index] = tensors[piece.name]
        fill(target, value)


@dataclass(frozen=True, slots=True)
class Piece:
    """A Hugging Face tensor and the part of ours that it is."""

    name: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


def layout(config: ModelConfig) -> dict[str, list[Piece]]:
    """For each of our tensors the Hugging Face tensors that are stacked in it."""
    vocabulary = (config.vocabulary_size, config.width)
    tensors = {"embedding": [_one("model.embed_tokens.weight", vocabulary)]}
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        tensors |= {
            ours + "attention_norm.weight": [_one(theirs + "input_layernorm.weight", (config.width,))],
            ours + "mlp_norm.weight": [_one(theirs + "post_attention_layernorm.weight", (config.width,))],
            **_attention_layout(ours + "attention.", theirs + "self_attn.", config),
        }
        if config.moe is not None and layer in config.moe.sparse_layers:
            tensors |= _moe_layout(ours + "mlp.", theirs + "mlp.", config)
        else:
            tensors |= _mlp_layout(ours + "mlp.", theirs + "mlp.", config.width, config.dense_hidden)
    tensors["norm.weight"] = [_one("model.norm.weight", (config.width,))]
    if not config.tied_embeddings:
        tensors["unembedding"] = [_one("lm_head.weight", vocabulary)]
    return tensors


def _attention_layout(ours: str, theirs: str, config: ModelConfig) -> dict[str, list[Piece]]:
    q_rows, kv_rows = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    parts = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
    tensors = {
        ours + "qkv": _stacked({f"{theirs}{part}.weight": rows for part, rows in parts.items()}, config.width),
        ours + "out": [_one(theirs + "o_proj.weight", (config.width, q_rows))],
    }
    if config.attention_bias:
        tensors[ours + "qkv_bias"] = _stacked({f"{theirs}{part}.bias": rows for part, rows in parts.items()})
    if config.output_bias:
        tensors[ours + "out_bias"] = [_one(theirs + "o_proj.bias", (config.width,))]
    if config.qk_norm:
        for norm in ("q_norm", "k_norm"):
            tensors[f"{ours}{norm}.weight"] = [_one(f"{theirs}{norm}.weight", (config.head_size,))]
    return tensors


def _mlp_layout(ours: str, theirs: str, width: int, hidden: int) -> dict[str, list[Piece]]:
    gate_up = {theirs + "gate_proj.weight": hidden, theirs + "up_proj.weight": hidden}
    return {
        ours + "gate_up": _stacked(gate_up, width),
        ours + "down": [_one(theirs + "down_proj.weight", (width, hidden))],
    }


def _moe_layout(ours: str, theirs: str, config: ModelConfig) -> dict[str, list[Piece]]:
    moe, width = config.moe, config.width
    assert moe is not None
    tensors = {ours + "router": [_one(theirs + "gate.weight", (moe.num_experts, width))]}
    if moe.score == "sigmoid":
        tensors[ours + "correction_bias"] = [_one(theirs + "gate.e_score_correction_bias", (moe.num_experts,))]
    for expert in range(moe.num_experts):
        inner = _mlp_layout(ours, f"{theirs}experts.{expert}.", width, moe.expert_hidden)
        for name, pieces in inner.items():
            tensors.setdefault(name, []).extend(
                Piece(piece.name, (expert, *piece.index), piece.shape) for piece in pieces
            )
    if moe.num_shared_experts:
        tensors |= _mlp_layout(ours + "shared.", theirs + "shared_experts.", width, moe.shared_hidden)
    return tensors


def _one(name: str, shape: tuple[int, ...]) -> Piece:
    return Piece(name, (), shape)


def _stacked(rows: Mapping[str, int], *columns: int) -> list[Piece]:
    pieces, start = [], 0
    for name, count in rows.items():
        pieces.append(Piece(name, (slice(start, start + count),), (count, *columns)))
        start += count
    return pieces


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a folder, each read from disk when it is asked for. Use as a context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_names = _files_by_tensor(folder)
        self._open: dict[Path, safe_open] = {}

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def __getitem__(self, name: str) -> Tensor:
        with self._file_of(name) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the headers of the files alone."""
        shapes = {}
        for name in self:
            with self._file_of(name) as file:
                shapes[name] = tuple(file.get_slice(name).get_shape())
        return shapes

    @contextmanager
    def _file_of(self, name: str) -> Iterator[Any]:
        path = self.folder / self.file_names[name]
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        try:
            yield self._open[path]
        except SafetensorError as error:
            raise CheckpointError(f"{path} holds no readable {name}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_names)

    def __len__(self) -> int:
        return len(self.file_names)


def _files_by_tensor(folder: Path) -> dict[str, str]:
    if (folder / INDEX_FILE).exists():
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map")
        return weight_map
    if not (folder / SINGLE_FILE).exists():
        raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    names: list[str] = _open_safetensors(folder / SINGLE_FILE).keys()  # type: ignore[no-untyped-call]
    return dict.fromkeys(names, SINGLE_FILE)


def _open_safetensors(path: Path) -> safe_open:
    if not path.exists():
        raise CheckpointError(f"{path} is missing, though the index of its folder names it")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error


def _check_fit(pieces: list[Piece], tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    expected = {piece.name: piece.shape for piece in pieces}
    found = tensors.shapes() if isinstance(tensors, SafetensorsFolder) else _shapes(tensors)
    misshapen = sorted(
        f"{name} has shape {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    )
    extra = [name for name in found if name not in expected and not _is_spare(name, config)]
    complaints = [f"{_some(missing)} missing"] if (missing := sorted(expected.keys() - found)) else []
    complaints += [f"{_some(sorted(extra))} not part of it"] if extra else []
    complaints += [_some(misshapen)] if misshapen else []
    if complaints:
        raise ValueError(f"tensors do not fit the config of this {config.family} model: {'; '.join(complaints)}")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _is_spare(name: str, config: ModelConfig) -> bool:
    """Tensors that published folders carry beside the model: next-token heads, tied copies, old tables."""
    if name == "lm_head.weight":
        return config.tied_embeddings
    if name.endswith("rotary_emb.inv_freq"):
        return True
    parts = name.split(".")
    after_the_last = parts[:2] == ["model", "layers"] and parts[2].isdecimal() and int(parts[2]) >= config.num_layers
    return after_the_last and config.family == "glm4_moe"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    return shown if len(names) <= MAX_NAMES_SHOWN else f"{shown} and {len(names) - MAX_NAMES_SHOWN} more"


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """One pass over the tensors; the files get their final names once their number is known."""
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        # A copy of its own: safetensors refuses tensors that share memory.
        shard[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
    if shard:
        yield shard


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` when all went well and vanishes otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        _swap(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _swap(unfinished: Path, folder: Path) -> None:
    if not folder.exists():
        unfinished.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old)


@contextmanager
def _failures_name(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else str(error)
        raise CheckpointError(f"model folder {folder}: {reason}") from error


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _generation_config(config: ModelConfig) -> dict[str, object]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    written = config.to_hugging_face()
    return {name: written[name] for name in names if written[name] is not None}


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in (*TOKENIZER_FILES, GENERATION_FILE):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _dtype_name(state: Mapping[str, Tensor]) -> str:
    return str(state["embedding"].dtype).removeprefix("torch.")

"""The table of exceptions: which modules hold matrices, how they store them, and what names say about them.

Nothing here decides where the layers are; words only break ties between stacks and label what was found.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _table(**roles: str) -> dict[str, str]:
    return {leaf: role for role, leaves in roles.items() for leaf in leaves.split()}


# ---------------------------------------------------------------- words in paths

VISION_WORDS = _set(
    "vision visual image images img video vit siglip vpm patch pixel resampler qformer perceiver connector projector "
    "merger aligner"
)
AUDIO_WORDS = _set("audio speech sound acoustic mel codec wav hubert conformer vocoder voice")
TEXT_WORDS = _set("text language llm lm")
# transformers' `main_input_name` says what a model without such words in its paths reads
INPUT_MODALITY = {
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "input_features": "audio",
    "input_values": "audio",
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def words(path: str) -> frozenset[str]:
    """The lower-case words of a dotted path: `model.vision_tower.blocks.3` gives model, vision, tower, blocks."""
    return frozenset(word.lower() for word in _WORD.findall(path))


def stack_labels(paths: list[str], main_input: str = "") -> list[frozenset[str]]:
    """Friendly names of stacks from their paths: some of encoder, decoder, text, vision, audio for each.

    `main_input` is transformers' `main_input_name`, for models whose paths do not say what they read.
    """
    sides = [next((w for w in re.split(r"[._]", path) if w in ("encoder", "decoder")), "") for path in paths]
    paired = {"encoder", "decoder"} <= set(sides)
    reads = INPUT_MODALITY.get(main_input, "")
    kinds = []
    for path, side in zip(paths, sides, strict=True):
        kind = _modality(path)
        kinds.append(kind or (reads if side == "encoder" or not paired else ""))
    if reads != "vision" and {"vision", "audio"} & set(kinds):
        kinds = [kind or "text" for kind in kinds]
    return [frozenset(label for label in pair if label) for pair in zip(sides, kinds, strict=True)]


def _modality(path: str) -> str:
    seen = words(path)
    if seen & VISION_WORDS:
        return "vision"
    if seen & AUDIO_WORDS:
        return "audio"
    return "text" if seen & TEXT_WORDS else ""


# ---------------------------------------------------------------- roles

_ATTENTION = _table(
    q="q q_proj query query_proj q_lin wq to_q q_linear linear_q",
    k="k k_proj key key_proj k_lin wk to_k k_linear linear_k",
    v="v v_proj value value_proj v_lin wv to_v v_linear linear_v",
    o="o o_proj out_proj out_lin out wo to_out to_out.0 c_proj dense proj dense_out linear_out",
    qkv="qkv qkv_proj c_attn query_key_value wqkv w_qkv in_proj attn_qkv to_qkv",
    q_a="q_a_proj",
    q_b="q_b_proj",
    kv_a="kv_a_proj_with_mqa",
    kv_b="kv_b_proj",
)
_MLP = _table(
    gate="gate_proj gate wi_0 w1 w_gate",
    up="up_proj up fc1 c_fc dense_h_to_4h wi wi_1 w3 w_up lin1 linear1 linear_1 fc_in ffn layer_1 "
    "intermediate.dense intermediate_dense",
    down="down_proj down fc2 c_proj dense_4h_to_h wo w2 w_down lin2 linear2 linear_2 fc_out ffn_output "
    "layer_2 output.dense output_dense output_linear",
    gate_up="gate_up_proj up_gate_proj gate_up input_linear",
)
_MIXER = _table(
    **{"in": "in_proj in_proj_qkvz in_proj_qkv", "out": "out_proj", "conv": "conv1d conv", "x": "x_proj"},
    dt="dt_proj",
    ba="in_proj_ba",
    a="in_proj_a",
    b="in_proj_b",
    z="in_proj_z",
)
_ROUTERS = _set("router router.layer router.classifier router.proj moe_gate")
_ATTENTION_WORDS = _set("attn attention selfattention mha")
_CROSS_WORDS = _set("cross crossattention encoder enc encdecattention multihead")
_MIXER_WORDS = _set("mamba mixer ssm recurrent rwkv conv linear_attn temporal_block")
_MLP_WORDS = _set("mlp ffn feed_forward feedforward ff ffw densereludense")


@lru_cache(maxsize=4096)
def role_of(path: str, per_expert: bool = False, moe: bool = False) -> str:
    """Role of a matrix from its path inside the block (`self_attn.q_proj` gives `attention.q`), else `other`.

    `per_expert`: the path is a 3-D parameter, one matrix per expert. `moe`: the block has experts, so `gate` routes.
    """
    parts = path.lower().split(".")
    above, leaf = parts[:-1], parts[-1]
    # some are told apart only with their parent: BERT's `intermediate.dense` and `output.dense`
    tails = (".".join(parts[-2:]), leaf)
    if leaf == "shared_expert_gate":
        return "moe.shared.router"
    if per_expert or "experts" in above:
        return _join("moe.experts", _look(_MLP, (*tails, *above[-1:])))
    if any(part.startswith("shared_expert") or part == "shared_mlp" for part in above):
        return _join("moe.shared", _look(_MLP, tails))
    if _routes(parts, moe):
        return "moe.router"
    seen = {word for part in above for word in (part, *words(part))}
    if seen & _MIXER_WORDS and _look(_MIXER, tails):
        return _join("mixer", _look(_MIXER, tails))
    if seen & _ATTENTION_WORDS or any(part.endswith(("attn", "attention")) for part in above):
        return _join("cross_attention" if seen & _CROSS_WORDS else "attention", _look(_ATTENTION, tails))
    if path.endswith("Wi"):  # ModernBERT writes its fused gate and up so; T5's `wi` is the plain one
        return "mlp.gate_up"
    if seen & _MLP_WORDS:
        return _join("mlp", _look(_MLP, tails) or ("down" if leaf in ("proj", "dense", "out") else None))
    # no parent speaks: OPT's and BART's `fc1`, BERT's `output.dense`, a hand-written `q_proj`
    role = _look(_MLP, tails)
    return _join("mlp", role) if role else _join("attention", _look(_ATTENTION, tails))


def _routes(parts: list[str], moe: bool) -> bool:
    """Routers are linears (`mlp.router`) or modules with a bare weight (`mlp.gate.weight`)."""
    if parts[-1] == "weight":
        parts, moe = parts[:-1], True
    if parts and parts[-1] in ("gate", "wg") and moe:
        return True
    return bool(parts) and (parts[-1] in _ROUTERS or ".".join(parts[-2:]) in _ROUTERS)


def _look(table: dict[str, str], tails: tuple[str, ...]) -> str | None:
    return next((table[tail] for tail in tails if tail in table), None)


def _join(kind: str, role: str | None) -> str:
    return f"{kind}.{role}" if role else "other"


# ---------------------------------------------------------------- matrices in modules

_EXPERT_WORDS = _set("expert experts moe")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "n_experts")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight that computes y = W x. `shape` is (out, in), (experts, out, in) or (out, in, *kernel) however stored."""

    name: str
    kind: str
    shape: tuple[int, ...]
    key: int  # identity of the tensor, so that shared ones are told


def matrices_of(name: str, module: nn.Module, hidden: int | None = None) -> tuple[Matrix, ...]:
    """The matrices that a module itself holds, not those of its children; `hidden` is the model's hidden size."""
    if isinstance(module, _ConvNd):
        if isinstance(module, _ConvTransposeNd):
            return ()
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        return (Matrix(name, "conv", shape, _key(module)),)
    if isinstance(module, Conv1D):
        return (Matrix(name, "conv1d", (module.nf, module.nx), _key(module)),)
    if _linear_like(module):
        sizes = module.__dict__
        return (Matrix(name, "linear", (sizes["out_features"], sizes["in_features"]), _key(module)),)
    return tuple(_bare(name, module, hidden)) if module._parameters else ()


def stored_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, also where DeepSpeed's third stage leaves an empty tensor."""
    return tuple(getattr(param, "ds_shape", param.shape))


def text_config(model: nn.Module) -> Any:
    """The config of the text part where a model has several, else the model's config, else None."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    if not callable(text):
        return config
    try:
        return text(decoder=True)
    except ValueError:  # transformers finds several text parts and will not choose
        return config


def _linear_like(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    # quantized linears of other libraries keep their sizes here while the weight is packed or has another name
    sizes = (module.__dict__.get("in_features"), module.__dict__.get("out_features"))
    if not all(isinstance(size, int) for size in sizes) or module._modules:
        return False
    weight = module._parameters.get("weight")
    return weight.ndim == 2 if weight is not None else bool(module._parameters or module._buffers)


def _bare(name: str, module: nn.Module, hidden: int | None) -> Iterator[Matrix]:
    """Weights that no linear holds: 3-D experts, and the 2-D weight of a router."""
    for key, param in module._parameters.items():
        shape = () if param is None else stored_shape(param)
        if len(shape) == 3 and _per_expert(name, module, shape[0]):
            if _transposed(name, module, key, shape, hidden):
                shape = (shape[0], shape[2], shape[1])
            yield Matrix(f"{name}.{key}", "experts", shape, id(param))
        elif len(shape) == 2 and key == "weight" and role_of(f"{name}.weight") == "moe.router":
            yield Matrix(f"{name}.weight", "parameter", shape, id(param))


def _per_expert(name: str, module: nn.Module, count: int) -> bool:
    if any(module.__dict__.get(attribute) == count for attribute in _EXPERT_COUNTS):
        return True
    return count > 1 and bool(words(name) & _EXPERT_WORDS)


def _transposed(name: str, module: nn.Module, key: str, shape: tuple[int, ...], hidden: int | None) -> bool:
    """Whether a 3-D weight is stored (experts, in, out): the module says so, or the hidden size is on that side."""
    said = module.__dict__.get("is_transposed")
    if isinstance(said, bool):
        return said
    reads_hidden = role_of(f"{name}.{key}", per_expert=True) != "moe.experts.down"
    return shape[1] != shape[2] and (shape[1] if reads_hidden else shape[2]) == hidden


def _key(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    return id(module if weight is None else weight)

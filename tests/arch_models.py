"""A tiny model with random weights for any architecture that llama.cpp knows, written as GGUF.

Nobody lists an architecture's tensors here: llama.cpp is given the metadata alone (llama_model_init_from_user) and asks for
each tensor by name and shape. It also asks for every optional one (biases, sinks, norms of heads), which is wanted: more is
tested. Weights follow from the tensor's name, so that a model is the same on every machine.

    python arch_models.py FOLDER [NAME ...]

One process can die of a model that llama.cpp aborts on; `make` runs it apart and goes on after it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Shapes = dict[str, tuple[int, ...]]
Value = int | float | bool | str | list[int] | list[float] | list[bool]

T = 128  # trained length of every model here, tokens
N_VOCAB = 128
N_EMBD = 64
N_HEAD, N_HEAD_KV = 4, 2
N_LAYER = 2
N_FF = 96
WINDOW = 32  # tokens, of sliding-window layers


@dataclass(frozen=True)
class ArchModel:
    """What to ask llama.cpp for.

    Attributes:
        architecture: general.architecture.
        metadata: what the architecture needs beside or instead of `common`; None leaves a key of it out.
        embedding: spread of the token embedding, where the architecture scales it, so that layers are not drowned out.
        without: pattern of optional tensors to leave out.
        zero: pattern of tensors that are 0.
        shapes: of all tensors, where llama.cpp cannot be asked for them.
    """

    architecture: str
    metadata: dict[str, Value | None] = field(default_factory=dict)
    embedding: float = 1.0
    without: str = ""
    zero: str = "^$"
    shapes: Shapes | None = None

    def all_metadata(self) -> dict[str, Value]:
        values = common() | self.metadata
        return {key: value for key, value in values.items() if value is not None}


def common() -> dict[str, Value | None]:
    """Sizes of a decoder with grouped queries."""
    return {
        "context_length": T,
        "vocab_size": N_VOCAB,
        "embedding_length": N_EMBD,
        "block_count": N_LAYER,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": N_EMBD // N_HEAD,
        "rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "no_vocab",
    }


Metadata = dict[str, Value | None]

SIGMOID = 2  # of expert_gating_func


def experts(**changes: Value) -> Metadata:
    """Four experts, two of them used by a token."""
    return {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 48, **changes}


def shared(**changes: Value) -> Metadata:
    """Experts as in DeepSeek: one that every token uses, and a first layer without any."""
    more = {"expert_shared_count": 1, "expert_shared_feed_forward_length": 48, "leading_dense_block_count": 1}
    return experts(expert_gating_func=SIGMOID) | more | changes


def windows(n_layer: int = 4, period: int = 2, size: int = WINDOW, wide: int = -1) -> Metadata:
    """Sliding-window layers: all but one in each period, by default its last. Two see everything: what the second of them
    reads was woven by the first."""
    pattern = [layer % period != wide % period for layer in range(n_layer)]
    return {"attention.sliding_window": size, "attention.sliding_window_pattern": pattern, "block_count": n_layer}


# M-RoPE: pairs that turn with time, height, width; and none with a fourth number, which is 0 for text
SECTIONS: Metadata = {"rope.dimension_sections": [4, 2, 2, 0]}

MLA: Metadata = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 32,
    "attention.key_length": 48,
    "attention.value_length": 32,
    "attention.key_length_mla": 32,
    "attention.value_length_mla": 16,
}
INDEXER: Metadata = {
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 32,
    "attention.indexer.top_k": 64,
    "attention.indexer.block_size": 4,
    "attention.indexer.local_blocks": 1,
    "attention.indexer.kpool": 4,
}
HYPER: Metadata = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.magnitude": 2.0,
    "hyper_connection.low_rank": 8,
}
AUDIO: Metadata = {
    "features_length": N_EMBD,
    "attention.group_norm_epsilon": 1e-5,
    "attention.group_norm_groups": 8,
    "posnet.embedding_length": N_EMBD,
    "posnet.block_count": 2,
    "convnext.embedding_length": N_EMBD,
    "convnext.block_count": 2,
}
STATES: Metadata = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 128,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 1,
}
KDA: Metadata = {"kda.head_dim": 16, "kda.gate_lower_bound": -5.0, "ssm.conv_kernel": 4}
WKV: Metadata = {
    "wkv.head_size": 16,
    "time_mix_extra_dim": 32,
    "time_decay_extra_dim": 32,
    "attention.decay_lora_rank": 16,
    "attention.iclr_lora_rank": 16,
    "attention.value_residual_mix_lora_rank": 16,
    "attention.gate_lora_rank": 16,
}
SECOND_RECURRENT: Metadata = {"attention.head_count": [N_HEAD, 0], "attention.head_count_kv": [N_HEAD_KV, 0]}

TIED = (
    3 / N_EMBD**0.5
)  # embedding, of models that have no other output matrix; Gemma multiplies by the root of its length too


def _draft_shapes(n_layer: int, n_backbone: int) -> Shapes:
    """Gemma 4's draft head: llama.cpp aborts when it is asked, on a tensor that it does not use."""
    n_head_size = N_EMBD // N_HEAD
    shapes: Shapes = {
        "token_embd.weight": (N_VOCAB, N_EMBD),
        "output_norm.weight": (N_EMBD,),
        "nextn.pre_projection.weight": (N_EMBD, 2 * n_backbone),
        "nextn.post_projection.weight": (n_backbone, N_EMBD),
        "rope_freqs.weight": (n_head_size // 2,),
    }
    for layer in range(n_layer):
        names: Shapes = {
            **dict.fromkeys(["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"], (N_EMBD,)),
            **dict.fromkeys(["attn_q", "attn_output"], (N_EMBD, N_EMBD)),
            **dict.fromkeys(["ffn_gate", "ffn_up"], (N_FF, N_EMBD)),
            **{"attn_q_norm": (n_head_size,), "layer_output_scale": (1,), "ffn_down": (N_EMBD, N_FF)},
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in names.items()}
    return shapes


def _models() -> dict[str, ArchModel]:
    models: dict[str, ArchModel] = {}

    def add(name: str, *metadata: Metadata, **options: Any) -> None:
        merged = {key: value for part in metadata for key, value in part.items()}
        models[name] = ArchModel(name.split(":")[0], merged, **options)

    # ordinary attention

    for name in (
        "llama qwen qwen2 qwen3 phi3 plamo codeshell orion internlm2 xverse starcoder2 olmo olmo2 exaone exaone4 arcee "
        "ernie4_5 seed_oss mistral3 jais2 falcon bloom refact hunyuan-dense hunyuan_vl maincoder"
    ).split():
        add(name)
    for name in "phi2 stablelm chatglm glm4 nemotron".split():
        add(name, {"rope.dimension_count": 8})
    add("olmoe", experts(), {"attention.head_count_kv": N_HEAD})
    for name in "qwen2moe qwen3moe phimoe arctic hunyuan-moe mellum".split():
        add(name, experts())
    for name in "smallthinker minimax-m2".split():
        add(name, experts(expert_gating_func=SIGMOID))
    for name in "dots1 deepseek2-ocr".split():
        add(name, shared(), {"attention.head_count_kv": N_HEAD})
    for name in "deepseek bailingmoe bailingmoe2 glm4moe laguna".split():
        add(name, shared())

    add("bitnet", embedding=TIED)
    for name in "pangu-embedded cogvlm".split():
        add(name, without="rope_freqs")  # loaded and not used, but by stock llama.cpp's shift of keys
    add("llama:moe", experts())
    add("qwen2:mha", {"attention.head_count_kv": N_HEAD})
    add("gptneox", {"use_parallel_residual": True, "rope.dimension_count": 8, "attention.head_count_kv": N_HEAD})
    add("mpt", {"attention.max_alibi_bias": 8.0}, without="position_embd")
    add("mpt:nope", without="position_embd")
    add("mpt:learned")
    add("jais", {"attention.max_alibi_bias": 8.0})
    # llama.cpp tells the two by their number of layers: RoPE, and ALiBi
    add("baichuan", {"block_count": 32})
    add("baichuan:13b", {"block_count": 40})
    add("smollm3", {"block_count": 4})  # the fourth layer has no RoPE
    add("gemma", embedding=TIED)
    add("gemma3:dense", embedding=TIED)
    add("command-r", {"logit_scale": 1.0}, embedding=TIED)
    add("minicpm", {"embedding_scale": 12.0, "residual_scale": 0.5, "logit_scale": 1.0}, embedding=1 / 12)
    scales: Metadata = {"embedding_scale": 12.0, "residual_scale": 0.5, "logit_scale": 1.0, "attention.scale": 0.25}
    add("granite", scales, embedding=1 / 12)
    add("granite:nope", scales, {"rope.scaling.finetuned": False}, embedding=1 / 12)
    add("granitemoe", scales, experts(), embedding=1 / 12)
    add("grok", experts(), embedding=1 / 78)
    add("dbrx", experts(), {"attention.clamp_kqv": 8.0})
    add("grovemoe", experts(expert_group_scale=1.0, experts_per_group=2))
    add("ernie4_5-moe", shared(interleave_moe_layer_step=1))
    add("deci", {"block_count": 3, "attention.head_count": [4, 0, 4], "attention.head_count_kv": [2, 0, 4]})
    heads: Metadata = {
        "attention.head_count": [4, 8],
        "attention.head_count_kv": [2, 4],
        "feed_forward_length": [96, 64],
    }
    add("openelm", heads, {"attention.key_length": 16, "attention.value_length": 16}, embedding=TIED)
    add("hrm_text", {"block_count": 6, "hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2})
    add("nanbeige", {"num_loops": 2})
    add("talkie", {"logit_scale": 1.0})
    add("hy_v3", shared())
    add("mistral3:temperature", {"attention.temperature_scale": 0.3, "rope.scaling.original_context_length": 32})
    add("chameleon", {"vocab_size": 10240})
    add("apertus", {f"xielu.{key}": 1.0 for key in ("alpha_n", "alpha_p", "beta")}, {"xielu.eps": 1e-7})
    add("plamo3:dense")
    add("pockettts", embedding=TIED)

    # M-RoPE

    for name in "qwen2vl qwen3vl paddleocr glm4:mrope hunyuan_vl:mrope".split():
        add(name, SECTIONS)
    add("qwen3vlmoe", SECTIONS, experts())
    add("glm4moe:mrope", SECTIONS, shared())
    add("qwen3tts", SECTIONS, {"vocab_size": 3072})

    # sliding windows

    for name in "gemma2 gemma3".split():
        add(name, windows(), embedding=TIED)
    # their norms after GELU would make its roundings large: stock llama.cpp differs from itself by 1, read in batches of 7
    without_gelu = r"\.(ffn_down|inp_gate)\."
    add("gemma3n", windows(22), embedding=TIED, zero=without_gelu)
    for name in "olmo2:windows plamo3".split():
        add(name, windows())
    for name in "mellum:windows gpt-oss".split():
        add(name, windows(), experts())
    # no other size
    add("smallthinker:windows", windows(8, 4, size=4096, wide=0), experts(expert_gating_func=SIGMOID))
    add("laguna:windows", windows(), shared())
    add("exaone4:windows", windows(64))  # llama.cpp goes by the number of layers
    add("cohere2", windows(), {"logit_scale": 1.0}, embedding=TIED)
    add("cohere2moe", windows(), shared(), {"logit_scale": 1.0}, embedding=TIED)
    add("llama4", shared(interleave_moe_layer_step=2), windows(8, 4, size=8192))  # chunks of 8192 tokens, no other size
    add("afmoe", windows(8, 4), shared())
    add("exaone-moe", windows(), shared())
    add("spark2_5", windows())
    add("mimo2", windows(), experts())
    add("step35", windows(), experts())
    add("maple", windows(), experts(swiglu_clamp_exp=7.0))
    add("muse-glimmer", windows(), {"logit_scale": 1.0})
    add("granite_swa", windows(), scales, embedding=1 / 12)
    swa_heads: Metadata = {"attention.key_length_swa": 16, "attention.value_length_swa": 16}
    per_layer: Metadata = {"embedding_length_per_layer_input": 16, "attention.shared_kv_layers": 0}
    add("gemma4", windows(), swa_heads, per_layer, embedding=TIED, zero=without_gelu)
    add("gemma-embedding", windows())
    add("modern-bert", windows(), {"attention.causal": False})

    # no ordinary cache: refused

    for name in "gpt2 starcoder".split():
        add(name)
    for name in "bert nomic-bert nomic-bert-moe jina-bert-v2 jina-bert-v3".split():
        add(name, {"tokenizer.ggml.token_type_count": 2, "attention.causal": False}, experts() if "moe" in name else {})
    for name in "neo-bert eurobert llama-embed".split():
        add(name, {"attention.causal": False})
    for name in "dream llada".split():
        add(name)
    for name in "llada-moe rnd1".split():
        add(name, experts())
    for name in "t5 t5encoder".split():
        add(name, {"attention.relative_buckets_count": 8})
    for name in "minicpm3 plm".split():
        add(name, MLA)
    for name in "deepseek2 mistral4".split():
        add(name, MLA, shared())
    for name in "deepseek32 glm-dsa".split():
        add(name, MLA, shared(), INDEXER)
    add("hy_v4", MLA, shared(), INDEXER, HYPER, {"attention.indexer.types": [1, 1]})
    add("minimax-m3", shared(), INDEXER, {"attention.indexer.head_count": N_HEAD_KV})
    for name in "mamba mamba2".split():
        add(name, STATES)
    for name in "rwkv6 rwkv6qwen2 rwkv7 arwkv7".split():
        add(name, WKV)
    for name in "jamba falcon-h1 plamo2 granitehybrid".split():
        add(name, STATES, SECOND_RECURRENT)
    three: Metadata = {"block_count": 3, "attention.head_count": [4, 0, 4], "attention.head_count_kv": [2, 0, 2]}
    for name in "nemotron_h nemotron_h_moe".split():
        more = shared() if "moe" in name else {}
        add(name, STATES, three, {"feed_forward_length": [0, 0, N_FF]}, more)
    for name in "lfm2 lfm2moe".split():
        add(name, {"shortconv.l_cache": 3}, SECOND_RECURRENT, shared() if "moe" in name else {})
    for name in "qwen3next qwen35 qwen35moe qwen4exp".split():
        more: Metadata = {} if name == "qwen35" else experts()
        if name == "qwen4exp":
            more |= INDEXER | HYPER
        add(name, STATES, SECTIONS, {"full_attention_interval": 2}, more)
    add("minimax-01", experts(), {"residual_scale": 1.0})
    residuals: Metadata = {"attn_res.block_size": 12, "activation.situ_beta": 4.0, "activation.situ_linear_beta": 25.0}
    add("kimi-linear", MLA, KDA, shared())
    add("kimi-k3", MLA, KDA, shared(), residuals)
    add("bailingmoe3", MLA, KDA, shared())
    add("glm5-next", MLA, KDA, shared(), INDEXER, HYPER)
    compressed: Metadata = {
        "attention.q_lora_rank": 32,
        "attention.output_group_count": 4,
        "attention.output_lora_rank": 16,
        "attention.compress_ratios": [0, 4, 0, 4],
        "attention.compress_rope_freq_base": 10000.0,
        "attention.head_count_kv": 1,
        "hash_layer_count": 0,
    }
    gate = experts(expert_gating_func=4, expert_weights_scale=1.0, expert_weights_norm=True, swiglu_clamp_exp=10.0)
    add("deepseek4", windows(), shared(), gate, INDEXER, HYPER, compressed)
    swa: Metadata = {
        "attention.kv_lora_rank_swa": 32,
        "attention.key_length_mla_swa": 32,
        "attention.value_length_mla_swa": 16,
        "rope.freq_base_swa": 10000.0,
        "attention.indexer.types": [0, 1, 0, 1],
    }
    add("dots3note", windows(), MLA, shared(), INDEXER, swa)
    adapters = {"adapters.count": 1, "adapters.lora_rank": 4}
    tokens: Metadata = {"adapters.token_ids_activate": [5], "adapters.token_ids_substitute": [6]}
    add("graniteswitch", scales, adapters, tokens)
    add("wavtokenizer-dec", AUDIO)
    add("eagle3", {"target_layers": [0, 1, 2], "target_hidden_size": N_EMBD, "block_count": 1})
    add("dflash", {"target_layers": [0, 1, 2]})
    nextn: Metadata = {"nextn_predict_layers": 2, "embedding_length_out": 2 * N_EMBD}
    add("gemma4-assistant", windows(2), swa_heads, nextn, shapes=_draft_shapes(2, 2 * N_EMBD))
    return models


MODELS: dict[str, ArchModel] = _models()
"""By name: the architecture's, or that and a variant after a colon."""


def find(name: str) -> ArchModel:
    """A model by name. With "/windows" or "/global" after it, the attention of all other layers adds nothing."""
    base, _, part = name.partition("/")
    model = MODELS[base]
    if not part:
        return model
    pattern = model.metadata["attention.sliding_window_pattern"]
    assert isinstance(pattern, list)
    silent = "|".join(str(layer) for layer, windowed in enumerate(pattern) if windowed == (part == "global"))
    return replace(model, zero=rf"{model.zero}|^blk\.({silent})\.attn_output\.")


# Weights.


def weights(name: str, shape: tuple[int, ...], embedding: float = 1.0) -> NDArray[np.float32]:
    """[shape] of the tensor of that name. Activations stay of order 1, attention is sharp, logits reach 10."""
    random = np.random.default_rng(list(name.encode()))
    *_, last, kind = f"..{name}".split(".")

    if last in ("rope_freqs", "rope_factors_long", "rope_factors_short"):
        return np.broadcast_to(np.geomspace(1, 4, shape[-1], dtype=np.float32), shape).copy()
    if "norm" in last and kind == "weight":
        gain = 1.6 if last in ("attn_q_norm", "attn_k_norm") else 1.0
        return (gain * random.normal(1, 0.1, shape)).astype(np.float32)
    if kind == "bias" or len(shape) == 1:
        return random.normal(0, 0.1, shape).astype(np.float32)
    if last == "token_embd":
        return random.normal(0, embedding, shape).astype(np.float32)
    gains = {"attn_q": 1.6, "attn_k": 1.6, "attn_qkv": 1.4, "output": 3.0, "ffn_gate_inp": 2.0, "ffn_down": 0.3}
    return random.normal(0, gains.get(last, 1.0) / np.sqrt(shape[-1]), shape).astype(np.float32)


# Asking llama.cpp.


class _Tensor(ctypes.Structure):
    """The beginning of ggml's struct ggml_tensor."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4)]


class _GgufParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def tensor_shapes(header: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape, outermost dimension first, of each tensor that llama.cpp wants for a file of metadata alone.

    Raises:
        ValueError: llama.cpp cannot make this model. (It may also abort.)
    """
    import llama_cpp

    llama = Path(llama_cpp.llama_cpp._lib._name)
    ggml = ctypes.CDLL(str(llama.with_name(f"libggml-base{llama.suffix}")))
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, _GgufParams]
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_free.argtypes = [ctypes.c_void_p]
    ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
    ggml.ggml_get_name.restype = ctypes.c_char_p

    shapes: dict[str, tuple[int, ...]] = {}

    def ask(address: int, _: object) -> None:
        tensor = _Tensor.from_address(address)
        if tensor.type != gguf.GGMLQuantizationType.F32:
            raise TypeError(f"a tensor of type {tensor.type}")
        n_dims = max(i + 1 for i in range(4) if tensor.ne[i] > 1 or i == 0)
        shapes[ggml.ggml_get_name(address).decode()] = tuple(tensor.ne[i] for i in reversed(range(n_dims)))

    callback = llama_cpp.llama_model_set_tensor_data_t(ask)
    metadata = ggml.gguf_init_from_file(str(header).encode(), _GgufParams(True, None))
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    try:
        model = llama_cpp.llama_model_init_from_user(metadata, callback, None, params)
        if not model:
            raise ValueError("llama.cpp cannot make this model")
        llama_cpp.llama_model_free(model)
    finally:
        ggml.gguf_free(metadata)
    return shapes


def _writer(path: Path, model: ArchModel) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, model.architecture)
    for key, value in model.all_metadata().items():
        if not key.startswith(("tokenizer.", "xielu.")):
            key = f"{model.architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    return writer


def write(model: ArchModel, path: Path) -> Path:
    """Write the model's file, in this process.

    Raises:
        ValueError: llama.cpp cannot make this model.
    """
    shapes = model.shapes
    if shapes is None:
        header = path.with_suffix(".header")
        writer = _writer(header, model)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        try:
            shapes = tensor_shapes(header)
        finally:
            header.unlink()

    writer = _writer(path, model)
    for name, shape in shapes.items():
        if re.search(r"\.(input_)?scale$", name):  # of quantized weights
            continue
        if not (model.without and re.search(model.without, name)):
            data = weights(name, shape, model.embedding)
            writer.add_tensor(name, np.zeros_like(data) if re.search(model.zero, name) else data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def try_out(path: Path) -> None:
    """Let llama.cpp read some tokens plainly, if Mesa is for this model: what aborts, aborts here and not in a test."""
    import llama_cpp

    from mesa_gguf.model.header import check_model

    if check_model(path).unsupported is None:
        llm = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
        if llama_cpp.llama_get_memory(llm._ctx.ctx):
            llm.eval([1, 2, 3, 4, 5])
        llm.close()


def each(command: Sequence[str | Path], names: Iterable[str]) -> dict[str, tuple[str | None, str]]:
    """Run a program with the names as its last arguments; it prints [name, result, reason] in JSON for one after another.
    Where llama.cpp takes the process with it, its last words are the reason, and the program is run again with the rest."""
    results: dict[str, tuple[str | None, str]] = {}
    left = list(names)
    while left:
        done = subprocess.run(
            [sys.executable, *map(str, command), *left],
            # PYTHONPATH: with PYTHONSAFEPATH a program's own folder is not searched
            env={
                **os.environ,
                "GGML_NO_BACKTRACE": "1",
                "PYTHONPATH": os.pathsep.join(
                    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
                ),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        for line in done.stdout.splitlines():
            name, result, reason = json.loads(line)
            results[name] = result, reason
            left.remove(name)
        if left:
            assert done.returncode != 0, f"{left[0]} was left out"
            said = re.findall(r"GGML_ASSERT\(.*\) failed|\w*Error: .*", done.stderr)
            results[left.pop(0)] = None, said[-1].strip() if said else f"exit status {done.returncode}"
    return results


def make(names: Iterable[str], folder: Path) -> dict[str, Path | str]:
    """Write models by name, in other processes -> the file of each, or why llama.cpp could not make it."""
    results = each([__file__, "--json", folder], names)
    return {name: Path(path) if path else reason for name, (path, reason) in results.items()}


def file_name(name: str) -> str:
    return f"{re.sub('[:/]', '-', name)}.gguf"


def tell(name: str, result: str | None, reason: str) -> None:
    """What `each` reads."""
    print(json.dumps([name, result, reason]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tiny models with random weights, one per architecture.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    if not arguments.json:
        for name, result in make(arguments.names or MODELS, arguments.folder).items():
            print(result if isinstance(result, Path) else f"{name}: {result}")
        return

    import mesa_gguf  # noqa: F401, I001  decides which library llama_cpp loads
    import llama_cpp

    said: list[str] = []

    def keep(level: int, text: bytes, _: object) -> None:
        if level >= 3:  # warnings and errors
            said.append(text.decode("utf-8", "replace"))

    log = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(log, None)

    for name in arguments.names:
        said.clear()
        try:
            path = write(find(name), arguments.folder / file_name(name))
            try_out(path)
            tell(name, str(path), "")
        except (ValueError, RuntimeError) as err:
            errors = re.findall(r"error loading model[^:]*: (.*)", "".join(said))
            tell(name, None, errors[-1] if errors else str(err))


if __name__ == "__main__":
    main()

"""Write a trained model as GGUF, or any such GGUF again with F32 weights.

python -m training.export --run run --out mesa_gguf/data --types q8_0 q4_0
python -m training.export --upcast mesa_gguf/data/mesa-reader-q8_0.gguf --out somewhere
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from training import model as models
from training.model import Model, Shape
from training.tokenizer import SPECIAL, Tokenizer

NAME = "mesa-reader"
DESCRIPTION = (
    "A very small reader: answers questions about the facts in a generated document. "
    "Trained on at most {context} tokens, to show what an extension of the context does."
)
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}


def parameters_of(model: Model) -> dict[str, Tensor]:
    """By llama.cpp's names. The output matrix is the embedding, so it is left out."""
    named = {"token_embd.weight": model.token_embd, "output_norm.weight": model.output_norm}
    for i, layer in enumerate(model.layers):
        named |= {f"blk.{i}.{name}.weight": p for name, p in layer.named_parameters()}
    return named


def file_name(name: str, shape: Shape, kind: str) -> str:
    """With T in it where that is another than the bundled model's."""
    return f"{name}-{kind}.gguf" if shape.context == Shape.context else f"{name}-{shape.context}-{kind}.gguf"


def export(
    model: Model, tokenizer: Tokenizer, path: Path, kind: str, name: str = NAME, description: str = DESCRIPTION
) -> None:
    shape = model.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_description(description.format(context=shape.context))
    writer.add_license("mit")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.n_vocab)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types([_token_type(token) for token in tokenizer.tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer.merges])
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.eos)
    writer.add_pad_token_id(tokenizer.pad)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)

    for name, parameter in parameters_of(model).items():
        data = parameter.detach().numpy().astype(np.float32)
        qtype = TYPES[kind] if data.ndim == 2 else TYPES["f32"]
        if kind == "q4_0" and name == "token_embd.weight":
            qtype = TYPES["q8_0"]  # it is the output matrix too
        writer.add_tensor(name, gguf.quants.quantize(data, qtype), raw_dtype=qtype)
    _finish(writer)


def load(path: Path) -> tuple[Model, Tokenizer]:
    """The model in a file that `export` wrote, and its vocabulary; weights as exact as the file has them."""
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    shape = Shape(
        n_vocab=field("llama.vocab_size"),
        n_embd=field("llama.embedding_length"),
        n_layer=field("llama.block_count"),
        n_head=field("llama.attention.head_count"),
        head_dim=field("llama.attention.key_length"),
        n_ff=field("llama.feed_forward_length"),
        context=field("llama.context_length"),
        rope_base=field("llama.rope.freq_base"),
        eps=field("llama.attention.layer_norm_rms_epsilon"),
    )
    model = Model(shape)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    with torch.no_grad():
        for name, parameter in parameters_of(model).items():
            data = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
            parameter.copy_(torch.from_numpy(data.astype(np.float32).reshape(parameter.shape)))
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    return model, Tokenizer(field("tokenizer.ggml.tokens"), merges)


def upcast(source: Path, path: Path) -> None:
    """The same model and vocabulary with every weight as F32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue
        value = field.contents()
        if field.name == gguf.Keys.General.FILE_TYPE:
            value = int(FILE_TYPES["f32"])
        writer.add_key_value(field.name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, data.astype(np.float32).reshape(tuple(reversed(tensor.shape.tolist()))))
    _finish(writer)


def _token_type(token: str) -> gguf.TokenType:
    if token in SPECIAL:
        return gguf.TokenType.CONTROL
    return gguf.TokenType.UNUSED if token.startswith("<|unused") else gguf.TokenType.NORMAL


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("run"))
    parser.add_argument("--out", type=Path, required=True, help="a directory")
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=["q8_0", "q4_0"])
    parser.add_argument("--upcast", type=Path, help="a GGUF file to write again as F32")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.upcast:
        upcast(args.upcast, args.out / f"{NAME}-f32.gguf")
        return
    model = models.load(args.run / "model.pt")
    tokenizer = Tokenizer.load(args.run / "tokenizer.json")
    for kind in args.types:
        export(model, tokenizer, args.out / file_name(NAME, model.shape, kind), kind)


if __name__ == "__main__":
    main()

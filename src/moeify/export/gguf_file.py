"""Export to GGUF files, which llama.cpp and programs built on it read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify.export.exporter import RECORD, Exporter, Verification
from moeify.export.gguf_families import ARCHITECTURES, Architecture
from moeify.export.gguf_tokenizer import read_tokenizer
from moeify.export.match import Match, best_match
from moeify.export.model_spec import ModelSpec, Unsupported
from moeify.export.nomic_bert import NOMIC_BERT_MOE, encoder_spec, is_encoder
from moeify.export.nomic_bert import ROUNDING as OF_HALF_GELU
from moeify.export.probe import Probe
from moeify.export.read import spec_of
from moeify.export.rewrites import rewritten
from moeify.registry import suggest

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
"""The types of weights, and the number of each as the type of a file."""
_BLOCK = 32
_STEP = {"f32": 0.0, "f16": 2**-10, "bf16": 2**-8, "q8_0": 1 / 127, "q4_0": 1 / 7}
"""The largest error of a weight that is read back, relative to the largest weight of its row."""
_ROUNDING = 1e-4
_EXACT = ("ffn_gate_inp", "token_types")
"""Matrices in fp32 in every file: routers, and the types of tokens, which llama.cpp adds as they are."""
_SMALL = 2**29
"""Models of at most this many parameters are also compared in fp32 where they are written in another type."""
_OF_A_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class GgufFile(Exporter):
    """A folder with one GGUF file, the tokenizer in it if there is one.

    Every weight is read back and compared. In `f32` llama.cpp must give the same logits. In other types it rounds
    activations too, and a router may choose another expert where two scores are nearly equal: there small models are
    also written and compared in `f32`, and the difference of the file itself is reported only.

    Attributes:
        weights: `f32`, `f16`, `bf16`, `q8_0` or `q4_0`; by default the dtype of the model. Norms, biases and routers
            stay in fp32.
        architecture: of llama.cpp; by default the one that needs the fewest rewrites.

    Raises:
        ValueError: an unknown type of weights.
    """

    weights: str | None = None
    architecture: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.weights not in TYPES:
            raise ValueError(f"{self.weights!r} is not a type of weights; {suggest(self.weights, [*TYPES])}")

    def match(self, model: nn.Module) -> Match[Architecture]:
        """The architecture, and the model expressed in its terms.

        Raises:
            Unsupported: no architecture, or not the requested one, computes what the model does.
        """
        encoder = is_encoder(model)
        architectures = {NOMIC_BERT_MOE.title: NOMIC_BERT_MOE} if encoder else ARCHITECTURES
        spec = encoder_spec(model) if encoder else spec_of(model)
        if not encoder and self._type(spec) in ("q8_0", "q4_0") and spec["expert_hidden"] % _BLOCK:
            spec = rewritten(spec, "expert_hidden", -(-spec["expert_hidden"] // _BLOCK) * _BLOCK) or spec
        if self.architecture is None:
            return best_match(spec, architectures.values(), "llama.cpp")
        if self.architecture not in architectures:
            near = suggest(self.architecture, [*architectures])
            raise Unsupported(f"no architecture with experts is called {self.architecture!r}; {near}")
        return best_match(spec, [architectures[self.architecture]], "llama.cpp")

    def _type(self, spec: ModelSpec) -> str:
        return self.weights or _OF_A_DTYPE[spec.tensors["model.embed_tokens.weight"].dtype]

    def write(self, model: Any, folder: Path) -> list[str]:
        """Write the file, and read every weight back."""
        gguf = _gguf()
        found = self.match(model)
        kind = self._type(found.spec)
        tokenizer = read_tokenizer(folder, found.spec["vocabulary"])
        path = folder / f"model-{kind}.gguf"
        writer = gguf.GGUFWriter(path, found.family.title)
        writer.add_file_type(TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in found.fields.items():
            _add(writer, f"{found.family.title}.{key}", value)
        if (token_types := found.spec.traits.get("token_types")) is not None:
            writer.add_token_type_count(token_types)
        if tokenizer is None:
            writer.add_tokenizer_model("no_vocab")
        else:
            tokenizer.write(writer, folder)
        widened = _write_tensors(writer, found, kind)
        writer.close()
        for file in folder.iterdir():
            if file != path and file.name != RECORD:
                file.unlink()
        notes = [f"{found.family.title}, {kind}, {'with' if tokenizer else 'no'} tokenizer", *found.rewrites]
        if widened:
            notes.append(f"in f16, since no block of {_BLOCK} fits: {', '.join(widened)}")
        if kind != "f32" and sum(tensor.numel() for tensor in found.spec.tensors.values()) <= _SMALL:
            with tempfile.TemporaryDirectory() as exact:
                in_fp32 = GgufFile("f32", found.family.title)
                in_fp32.write(model, Path(exact))
                notes.append(f"in f32 {in_fp32.verify(Path(exact), Probe.of(model))}")
        return notes

    def verify(self, folder: Path, probe: Probe) -> Verification:
        """Compare tensor names with those that llama.cpp reads, and the logits if `llama_cpp` is installed."""
        gguf = _gguf()
        (path,) = folder.glob("*.gguf")
        kind = path.stem.removeprefix("model-")
        title = _check_names(gguf.GGUFReader(path))
        try:
            import llama_cpp
        except ImportError:
            note = "names were compared; to compare logits too, pip install llama-cpp-python"
            return Verification(f"gguf {_version('gguf')}", None, note=note)
        encoder = title == NOMIC_BERT_MOE.title
        found = (_hidden_states if encoder else _logits)(llama_cpp, path, probe)
        difference, rounding = probe.difference(found), OF_HALF_GELU if encoder else _ROUNDING
        if difference > (rounding * max(1.0, probe.size) if kind == "f32" else torch.finfo(torch.float32).max):
            outputs = "hidden states" if encoder else "logits"
            raise ValueError(f"llama.cpp gives other {outputs} than the model, by {difference:.3g}")
        program = f"llama-cpp-python {_version('llama_cpp_python')}"
        return Verification(program, difference, None if encoder else probe.agreement(found))


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds[type(value)](key, value)


def _write_tensors(writer: Any, found: Match[Architecture], kind: str) -> list[str]:
    """Write all tensors, and return the names of those whose rows do not divide into blocks."""
    import gguf

    widened = []
    for name, tensor in _named(found):
        values = tensor.float().contiguous().numpy()
        chosen = kind if tensor.dim() > 1 and not any(part in name for part in _EXACT) else "f32"
        if chosen in ("q8_0", "q4_0") and tensor.shape[-1] % _BLOCK:
            chosen = "f16"
            widened.append(name)
        type_ = gguf.GGMLQuantizationType[chosen.upper()]
        data = gguf.quants.quantize(values, type_)
        back = torch.from_numpy(gguf.quants.dequantize(data, type_)).reshape(tensor.shape)
        wrong = (back - tensor.float()).abs() - _STEP[chosen] * tensor.float().abs().amax(-1, keepdim=True)
        if not (wrong <= 0).all():
            raise ValueError(f"{name} does not fit into {chosen}: it changes when it is read back")
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    return widened


def _named(found: Match[Architecture]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name in the file; llama.cpp's shared gate is a vector."""
    import gguf

    arch = _arch(found.family.title)
    known = gguf.get_tensor_name_map(arch, found.spec["layers"])
    for name, tensor in found.tensors(layer="blk.{}.").items():
        if name.startswith("blk."):
            yield name, tensor.flatten() if name.endswith("ffn_gate_inp_shexp.weight") else tensor
            continue
        stored = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise Unsupported(f"{found.family.title} has no place for {name}")
        yield stored, tensor
    if found.spec["rope"]["rope_type"] != "default":
        yield "rope_freqs.weight", _frequency_factors(found.spec)


def _frequency_factors(spec: ModelSpec) -> Tensor:
    """The divisors of the rotary frequencies, (head_dim / 2)."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {key: value for key, value in spec["rope"].items() if key != "partial_rotary_factor"}
    config = LlamaConfig(
        hidden_size=spec["width"], num_attention_heads=spec["heads"], head_dim=spec["head_dim"], rope_parameters=rope,
        max_position_embeddings=spec["positions"],
    )  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device="cpu")
    steps = torch.arange(0, spec["head_dim"], 2, dtype=torch.float32) / spec["head_dim"]
    return rope["rope_theta"] ** -steps / scaled


def _check_names(reader: Any) -> str:
    """The architecture of a file, after a check that llama.cpp reads every tensor name.

    Raises:
        ValueError: a name that it does not read.
    """
    import gguf

    title = reader.get_field("general.architecture").contents()
    layers = reader.get_field(f"{title}.block_count").contents()
    names = [gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[_arch(title)]]
    known = {name.format(bid=i) for name in names for i in range(layers)}
    strange = [tensor.name for tensor in reader.tensors if tensor.name.rpartition(".")[0] not in known]
    if strange:
        raise ValueError(f"llama.cpp's {title} has no tensors {', '.join(strange[:5])}")
    return title


def _arch(title: str) -> Any:
    import gguf

    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == title)


def _logits(llama_cpp: Any, path: Path, probe: Probe) -> Tensor:
    """The logits of llama.cpp, one sequence at a time."""
    length = probe.ids.shape[1]
    model = _opened(llama_cpp, path, length, logits_all=True)
    logits = []
    for ids in probe.ids.tolist():
        model.reset()
        model.eval(ids)
        logits.append(torch.tensor(model.scores[:length]))
    model.close()
    return torch.stack(logits)


def _hidden_states(llama_cpp: Any, path: Path, probe: Probe) -> Tensor:
    """The hidden states of an encoder in llama.cpp, not pooled, one sequence at a time."""
    import numpy as np

    length = probe.ids.shape[1]
    model = _opened(llama_cpp, path, length, embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE)
    states = []
    for ids in probe.ids.tolist():
        tokens = (llama_cpp.llama_token * length)(*ids)  # the batch holds a pointer to it
        if llama_cpp.llama_encode(model.ctx, llama_cpp.llama_batch_get_one(tokens, length)) != 0:
            raise ValueError(f"llama.cpp cannot compute {path.name}")
        found = np.ctypeslib.as_array(llama_cpp.llama_get_embeddings(model.ctx), (length, model.n_embd()))
        states.append(torch.from_numpy(found.copy()))
    model.close()
    return torch.stack(states)


def _opened(llama_cpp: Any, path: Path, length: int, **options: Any) -> Any:
    """A file in llama.cpp, with caches in fp32."""
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    sizes = {"n_ctx": length, "n_batch": length, "n_ubatch": length, "n_threads": 1}
    return llama_cpp.Llama(str(path), verbose=False, **sizes, **exact, **options)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need the package gguf: pip install 'moeify[gguf]'") from None
    return gguf


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)

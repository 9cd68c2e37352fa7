"""Batched inference: uint8 patches in, numpy features out."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from lrmil.encoders.settings import Precision
from lrmil.encoders.vit import Encoder
from lrmil.errors import ConfigError, EncoderError

FloatArray = npt.NDArray[np.float32]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Embedded:
    """Features of N patches, float32."""

    embedding: FloatArray
    """(N, E)"""
    cls: dict[int, FloatArray] = field(default_factory=dict)
    """layer: (N, W)"""
    tokens: dict[int, FloatArray] = field(default_factory=dict)
    """layer: (N, G, G, W), [image row, image column]"""


def embed(
    encoder: Encoder,
    images: npt.NDArray[np.uint8] | torch.Tensor,
    *,
    cls_layers: Iterable[int] = (),
    token_layers: Iterable[int] = (),
    precision: Precision = "auto",
    batch_size: int | None = None,
) -> Embedded:
    """Encode patches where the encoder is, without keeping anything for a backward pass.

    Args:
        encoder: on any device.
        images: (N, P, P, 3) uint8 RGB; N may be 0. A tensor may be on the encoder's device already.
        cls_layers: blocks whose class tokens are wanted as well.
        token_layers: blocks whose patch tokens are wanted as well (G * G times as large).
        precision: see `choose_dtype`.
        batch_size: images at once; default `default_batch`.

    Raises:
        EncoderError: wrong shapes, no such layer, or features that are not finite.
        ConfigError: a precision that the device does not have.
    """
    cls_layers, token_layers = tuple(cls_layers), tuple(token_layers)
    device = encoder.device
    dtype = choose_dtype(encoder, precision)
    batch_size = batch_size or default_batch(encoder)
    embeddings: list[torch.Tensor] = []
    cls: dict[int, list[torch.Tensor]] = {layer: [] for layer in cls_layers}
    tokens: dict[int, list[torch.Tensor]] = {layer: [] for layer in token_layers}
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.inference_mode(), _autocast(device, dtype):
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size]
                batch = part if isinstance(part, torch.Tensor) else torch.from_numpy(np.require(part, None, ["C", "W"]))
                out = encoder(encoder.normalise(batch), cls_layers=cls_layers, token_layers=token_layers)
                # Stays on the device: fetching every batch would make the GPU wait for the CPU.
                embeddings.append(out.embedding.float())
                for layer in cls_layers:
                    cls[layer].append(out.cls[layer].float())
                for layer in token_layers:
                    tokens[layer].append(out.tokens[layer].float())
    finally:
        encoder.train(was_training)
    side, width = encoder.token_grid_side, encoder.trunk_width
    result = Embedded(
        embedding=_gather(embeddings, (encoder.embed_dim,)),
        cls={layer: _gather(parts, (width,)) for layer, parts in cls.items()},
        tokens={layer: _gather(parts, (side, side, width)) for layer, parts in tokens.items()},
    )
    if not all(np.isfinite(values).all() for values in (result.embedding, *result.cls.values())):
        raise EncoderError(
            f"{encoder.card.name}: features computed in {str(dtype).removeprefix('torch.')} are not finite.",
            fix="Use precision=float32." if dtype != torch.float32 else "Check the weight file.",
        )
    return result


def default_batch(encoder: Encoder) -> int:
    """Images at once: 64 on a GPU; on a CPU 4 to 16, about 2,000 tokens, whose activations stay in a core's cache.

    Measured on one core, images/s at 4, 8, 16 and 32 at once: width 128, 64 tokens: 106, 128, 138, 118; ViT-S,
    256 tokens: 5.0, 5.2, 4.5, 4.1.
    """
    if encoder.device.type != "cpu":
        return 64
    return max(4, min(16, 2048 // encoder.token_grid_side**2))


def choose_dtype(encoder: Encoder, precision: Precision = "auto") -> torch.dtype:
    """Return the type that matrix products are computed in; sums, norms and outputs stay float32.

    `auto` takes 16 bits on a CUDA GPU (the card's type; float16 where the GPU lacks bfloat16), bfloat16 on a CPU that
    has instructions for it, and float32 elsewhere: emulated bfloat16 is six times slower than float32.

    Raises:
        ConfigError: float16 on a CPU, which has no fast products for it.
    """
    device = encoder.device.type
    if precision != "auto":
        if precision == "float16" and device == "cpu":
            raise ConfigError("a CPU does not compute in float16.", fix="Use precision=auto, bfloat16 or float32.")
        return _DTYPES[precision]
    if device == "cuda":
        dtype = _DTYPES[encoder.card.gpu_precision]
        native = dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
        return dtype if native else torch.float16
    if device == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _gather(parts: list[torch.Tensor], shape: tuple[int, ...]) -> FloatArray:
    if not parts:
        return np.empty((0, *shape), np.float32)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).cpu().numpy()

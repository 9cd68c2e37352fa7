"""The encoders that are known by name. Facts only; no weight is read and no server asked to list them.

Architecture and preprocessing are those the authors publish; a weight file that does not fit to the last entry is
refused, so that a wrong line here cannot give wrong features silently. `share_derivatives` is about a student distilled
from the encoder: where it is False, what LRMIL trains with it stays with the user who was granted the weights.
"""

from __future__ import annotations

from lrmil.encoders.cards import EncoderCard, register_encoder

_SWIGLU = {"mlp_layer": "swiglu_packed", "act_layer": "silu"}
_VIT_B = {"width": 768, "depth": 12}
_VIT_L = {"width": 1024, "depth": 24}
_VIT_G = {"width": 1536, "depth": 40}
_NC_ND = "CC-BY-NC-ND 4.0 (non-commercial research, no derivatives, each user registers)"
_MEDIUM = {"native_mpp": (0.5,), "table_px": 224, "input_px": 224}
_OPTIMUS = {
    **_VIT_G,
    **_MEDIUM,
    "architecture": "vit_giant_patch14_reg4_dinov2",
    "token_px": 14,
    "mean": (0.707223, 0.578729, 0.703617),
    "std": (0.211883, 0.230117, 0.177517),
    "gated": True,
}
_HIBOU = {
    **_MEDIUM,
    "token_px": 14,
    "mean": (0.7068, 0.5755, 0.7220),
    "std": (0.1950, 0.2316, 0.1816),
    "licence": "Apache-2.0",
    "share_derivatives": True,
    "citation": "Nechaev et al., Hibou: a family of foundational vision transformers for pathology, arXiv 2406.05074",
}
_DINOV2 = {
    "token_px": 14,
    "table_px": 518,
    "input_px": 224,
    "licence": "Apache-2.0",
    "share_derivatives": True,
    "citation": "Oquab et al., DINOv2: learning robust visual features without supervision, TMLR 2024",
}

_CARDS: tuple[dict[str, object], ...] = (
    {
        "name": "conch-v1",
        "title": "CONCH",
        "aliases": ("conch",),
        "architecture": "vit_base_patch16_224",
        **_VIT_B,
        "token_px": 16,
        "table_px": 448,
        "input_px": 448,
        "attention_pool_width": 512,
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
        "native_mpp": (0.5,),
        "licence": _NC_ND,
        "gated": True,
        "share_derivatives": False,
        "source": "MahmoodLab/CONCH",
        "files": ("pytorch_model.bin",),
        "ckpt_variable": "CONCH_CKPT_PATH",
        "citation": "Lu et al., A visual-language foundation model for computational pathology, Nature Medicine 2024",
    },
    {
        "name": "uni",
        "title": "UNI",
        "aliases": ("uni-v1",),
        "architecture": "vit_large_patch16_224",
        "arch_args": {"init_values": 1e-5},
        **_VIT_L,
        **_MEDIUM,
        "token_px": 16,
        "licence": _NC_ND,
        "gated": True,
        "share_derivatives": False,
        "source": "MahmoodLab/UNI",
        "files": ("pytorch_model.bin",),
        "citation": "Chen et al., Towards a general-purpose foundation model for computational pathology, "
        "Nature Medicine 2024",
    },
    {
        "name": "uni2-h",
        "title": "UNI2-h",
        "aliases": ("uni2", "uni-v2"),
        "architecture": "vit_giant_patch14_224",
        "arch_args": {
            "embed_dim": 1536,
            "depth": 24,
            "num_heads": 24,
            "mlp_ratio": 5.33334,
            "init_values": 1e-5,
            "reg_tokens": 8,
            "no_embed_class": True,
            **_SWIGLU,
        },
        "width": 1536,
        "depth": 24,
        **_MEDIUM,
        "token_px": 14,
        "gpu_precision": "bfloat16",
        "licence": _NC_ND,
        "gated": True,
        "share_derivatives": False,
        "source": "MahmoodLab/UNI2-h",
        "files": ("pytorch_model.bin",),
        "citation": "Chen et al., Towards a general-purpose foundation model for computational pathology, "
        "Nature Medicine 2024",
    },
    {
        "name": "virchow",
        "title": "Virchow",
        "architecture": "vit_huge_patch14_224",
        "arch_args": {"init_values": 1e-5, "mlp_ratio": 5.3375, **_SWIGLU},
        "width": 1280,
        "depth": 32,
        **_MEDIUM,
        "token_px": 14,
        "embedding": "cls+token_mean",
        "licence": "Apache-2.0 (each user registers)",
        "gated": True,
        "share_derivatives": True,
        "source": "paige-ai/Virchow",
        "citation": "Vorontsov et al., A foundation model for clinical-grade computational pathology, "
        "Nature Medicine 2024",
    },
    {
        "name": "virchow2",
        "title": "Virchow2",
        "architecture": "vit_huge_patch14_224",
        "arch_args": {"init_values": 1e-5, "mlp_ratio": 5.3375, "reg_tokens": 4, **_SWIGLU},
        "width": 1280,
        "depth": 32,
        **_MEDIUM,
        "token_px": 14,
        "native_mpp": (0.25, 0.5, 1.0, 2.0),
        "embedding": "cls+token_mean",
        "licence": _NC_ND,
        "gated": True,
        "share_derivatives": False,
        "source": "paige-ai/Virchow2",
        "citation": "Zimmermann et al., Virchow2: scaling self-supervised mixed magnification models in pathology, "
        "arXiv 2408.00738",
    },
    {
        "name": "prov-gigapath",
        "title": "Prov-GigaPath",
        "aliases": ("gigapath",),
        "architecture": "vit_giant_patch14_dinov2",
        "arch_args": {"patch_size": 16},
        **_VIT_G,
        **_MEDIUM,
        "token_px": 16,
        "licence": "Prov-GigaPath research terms (each user registers)",
        "gated": True,
        "share_derivatives": False,
        "source": "prov-gigapath/prov-gigapath",
        "files": ("pytorch_model.bin",),
        "citation": "Xu et al., A whole-slide foundation model for digital pathology from real-world data, Nature 2024",
    },
    {
        "name": "h-optimus-0",
        "title": "H-optimus-0",
        "aliases": ("hoptimus0",),
        **_OPTIMUS,
        "licence": "Apache-2.0 (each user registers)",
        "share_derivatives": True,
        "source": "bioptimus/H-optimus-0",
        "citation": "Saillard et al., H-optimus-0, Bioptimus 2024",
    },
    {
        "name": "h-optimus-1",
        "title": "H-optimus-1",
        "aliases": ("hoptimus1",),
        **_OPTIMUS,
        "licence": _NC_ND,
        "share_derivatives": False,
        "source": "bioptimus/H-optimus-1",
        "citation": "H-optimus-1, Bioptimus 2025",
    },
    {
        "name": "phikon-v2",
        "title": "Phikon-v2",
        "architecture": "vit_large_patch14_dinov2",
        "arch_args": {"patch_size": 16},
        **_VIT_L,
        **_MEDIUM,
        "token_px": 16,
        "licence": "Owkin non-commercial licence",
        "share_derivatives": False,
        "source": "owkin/phikon-v2",
        "citation": "Filiot et al., Phikon-v2, a large and public feature extractor for biomarker prediction, "
        "arXiv 2409.09173",
    },
    {
        "name": "midnight",
        "title": "Midnight-12k",
        "aliases": ("midnight12k", "midnight-12k"),
        "architecture": "vit_giant_patch14_dinov2",
        **_VIT_G,
        **_MEDIUM,
        "token_px": 14,
        "native_mpp": (0.25, 0.5, 1.0, 2.0),
        "embedding": "cls+token_mean",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "licence": "MIT",
        "share_derivatives": True,
        "source": "kaiko-ai/midnight",
        "citation": "Karasikov et al., Training state-of-the-art pathology foundation models with orders of magnitude "
        "less data, arXiv 2504.05186",
    },
    {
        "name": "hibou-b",
        "title": "Hibou-B",
        **_HIBOU,
        "architecture": "vit_base_patch14_reg4_dinov2",
        "arch_args": {"mlp_ratio": 5.33334, **_SWIGLU},
        **_VIT_B,
        "source": "histai/hibou-b",
    },
    {
        "name": "hibou-l",
        "title": "Hibou-L",
        **_HIBOU,
        "architecture": "vit_large_patch14_reg4_dinov2",
        "arch_args": {"mlp_ratio": 5.34375, **_SWIGLU},
        **_VIT_L,
        "gated": True,
        "source": "histai/hibou-L",
    },
    {
        "name": "dinov2-small",
        "title": "DINOv2 ViT-S/14",
        "aliases": ("dinov2-s",),
        **_DINOV2,
        "architecture": "vit_small_patch14_dinov2",
        "width": 384,
        "depth": 12,
        "source": "timm/vit_small_patch14_dinov2.lvd142m",
    },
    {
        "name": "dinov2-base",
        "title": "DINOv2 ViT-B/14",
        "aliases": ("dinov2-b",),
        **_DINOV2,
        "architecture": "vit_base_patch14_dinov2",
        **_VIT_B,
        "source": "timm/vit_base_patch14_dinov2.lvd142m",
    },
    {
        "name": "dinov2-large",
        "title": "DINOv2 ViT-L/14",
        "aliases": ("dinov2-l",),
        **_DINOV2,
        "architecture": "vit_large_patch14_dinov2",
        **_VIT_L,
        "source": "timm/vit_large_patch14_dinov2.lvd142m",
    },
)


def register_all() -> None:
    """Put the cards of this file into the registry."""
    for fields in _CARDS:
        register_encoder(EncoderCard.model_validate(fields))

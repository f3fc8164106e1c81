"""The descriptor by which the registry knows Mllama."""

from mmchat.models.family import Family
from mmchat.models.mllama import params, translate

FAMILY = Family(
    model_type="mllama",
    sections=params.SECTIONS,
    parse=params.parse,
    from_hf_config=translate.from_hf_config,
    from_meta_params=translate.from_meta_params,
    parameter_count=params.parameter_count,
    tile_size=params.tile_size,
    with_tile_size=params.with_tile_size,
    model="mmchat.models.mllama.model:MllamaForConditionalGeneration",
    processor="mmchat.models.mllama.processor:MllamaProcessor",
    weights="mmchat.models.mllama.weights",
    prompt="mmchat.models.mllama.prompt",
    documents="mmchat.models.mllama.documents",
    export="mmchat.models.mllama.export",
    export_portable="mmchat.models.mllama.export_portable",
    footprint="mmchat.models.mllama.footprint:footprint",
)

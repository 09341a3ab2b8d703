"""The key map between diffusers' names, which are ours, and those of whole single files in SDXL's original layout.

Each map goes from our name of a tensor to its name in the file, and to what makes ours of it.
"""

from collections.abc import Callable

from torch import Tensor

from fulgurite.models import CLIPTextConfig, UNetConfig, VAEConfig

Change = Callable[[Tensor], Tensor]
KeyMap = dict[str, tuple[str, Change]]

# What each network's tensors begin with.
UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT_ENCODERS = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
PREFIXES = (UNET, VAE, *TEXT_ENCODERS)

# Known leftovers of training and of other tools' conversions; no network computes with them.
HARMLESS = (
    "model_ema.",
    "first_stage_model.model_ema.",
    "first_stage_model.loss.",
    "alphas_cumprod",
    "betas",
    "log_one_minus_alphas_cumprod",
    "posterior_",
    "sqrt_",
    "denoiser.",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
    "conditioner.embedders.1.model.logit_scale",
    "text_model.embeddings.position_ids",  # in diffusers' layout too
)


def same(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t()


def as_linear(tensor: Tensor) -> Tensor:
    """A convolution of one pixel ``[O, I, 1, 1]`` as the matrix it is; a vector stays."""
    return tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor


def third(index: int) -> Change:
    """Query, key or value of a fused projection ``[3 * D, ...]``."""
    return lambda tensor: tensor.tensor_split(3)[index]


def translated(name: str, modules: dict[str, str]) -> str:
    """A tensor's name with its longest leading part that is in ``modules`` replaced."""
    head = name
    while head not in modules:
        head, dot, _ = head.rpartition(".")
        if not dot:
            return name
    return modules[head] + name[len(head) :]


# Inside a residual block of the UNet.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """The UNet's modules: the original one numbers its blocks in one row down, and in one row up."""
    layers, levels = config.layers_per_block, len(config.block_out_channels)
    blocks = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    others = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for level in range(levels):
        down, up = 1 + level * (layers + 1), level * (layers + 1)
        for i in range(layers):
            blocks[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{down + i}.0"
            others[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{down + i}.1"
        others[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{down + layers}.0.op"
        for i in range(layers + 1):
            blocks[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{up + i}.0"
            others[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{up + i}.1"
        # The upsampler comes last in its block: after a residual block, and after attention where there is any.
        place = 2 if config.transformer_layers_per_block[levels - 1 - level] else 1
        others[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{up + layers}.{place}.conv"
    for ours, theirs in blocks.items():
        others |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESNET.items()}
    return others


def unet_keys(names: list[str], config: UNetConfig) -> KeyMap:
    modules = unet_modules(config)
    return {name: (UNET + translated(name, modules), same) for name in names}


def vae_modules(config: VAEConfig) -> dict[str, str]:
    """The VAE's modules: the original one counts the decoder's blocks from the pixels, not from the latents."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    modules = {}
    for level in range(levels):
        for i in range(layers):
            modules[f"encoder.down_blocks.{level}.resnets.{i}"] = f"encoder.down.{level}.block.{i}"
        modules[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        for i in range(layers + 1):
            modules[f"decoder.up_blocks.{level}.resnets.{i}"] = f"decoder.up.{levels - 1 - level}.block.{i}"
        modules[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{levels - 1 - level}.upsample"
    for half in ("encoder", "decoder"):
        modules |= {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in range(2)}
        attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        modules |= {f"{half}.mid_block.attentions.0.{a}": f"{half}.mid.attn_1.{b}" for a, b in attention.items()}
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
    shortcuts = {f"{a}.conv_shortcut": f"{b}.nin_shortcut" for a, b in modules.items() if ".resnets." in a}
    return modules | shortcuts


def vae_keys(names: list[str], config: VAEConfig) -> KeyMap:
    modules = vae_modules(config)
    return {name: (VAE + translated(name, modules), as_linear if ".to_" in name else same) for name in names}


def text_modules(config: CLIPTextConfig) -> dict[str, str]:
    """open_clip's names of the second text encoder's modules."""
    modules = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_projection.weight": "text_projection",
    }
    inner = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
        **{f"self_attn.{x}_proj.{kind}": f"attn.in_proj_{kind}" for x in "qkv" for kind in ("weight", "bias")},
    }
    for i in range(config.num_hidden_layers):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        modules |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in inner.items()}
    return modules


def text_keys(names: list[str], config: CLIPTextConfig, second: bool) -> KeyMap:
    """The first encoder is stored under transformers' names, the second under open_clip's."""
    if not second:
        return {name: (TEXT_ENCODERS[0] + name, same) for name in names}
    modules = text_modules(config)
    thirds = {f"{x}_proj": third(i) for i, x in enumerate("qkv")}
    changes = {"text_projection": transposed, **thirds}
    return {
        name: (TEXT_ENCODERS[1] + translated(name, modules), changes.get(name.split(".")[-2], same)) for name in names
    }

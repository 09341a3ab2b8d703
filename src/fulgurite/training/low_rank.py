"""LoRA (Hu et al., arXiv 2106.09685) in training: small changes beside the layers of a UNet that stays as it is."""

from pathlib import Path

from torch import Tensor, nn

from fulgurite.weights.files import read

Layer = nn.Linear | nn.Conv2d
EDGES = ("conv_in", "conv_out", "time_embedding", "add_embedding")


class Change(nn.Module):
    """A change of low rank to one layer: nothing at first. Parameter names are those of the published files."""

    def __init__(self, layer: Layer, rank: int) -> None:
        super().__init__()
        self.lora_down: Layer
        self.lora_up: Layer
        if isinstance(layer, nn.Conv2d):
            self.lora_down = nn.Conv2d(
                layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False  # type: ignore[arg-type]
            )  # fmt: skip
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_up(self.lora_down(x))


class LoRA(nn.ModuleDict):
    """Changes of every linear layer and every convolution of a UNet; without its ``edges`` as the paper has them.

    Those are the first and the last convolution, and the layers of the timestep's and the sizes' embeddings
    (arXiv 2402.13929, section 3.6). Its state is a LoRA file as SDXL-Lightning's are:
    ``lora_unet_down_blocks_0_...lora_down.weight``. (diffusers reads no changes of the sizes' embedding.)
    """

    def __init__(self, unet: nn.Module, rank: int, edges: bool = True) -> None:
        layers = {
            name: layer
            for name, layer in unet.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and (edges or name.partition(".")[0] not in EDGES)
        }
        super().__init__({published_name(name): Change(layer, rank) for name, layer in layers.items()})

    def attach(self, unet: nn.Module) -> None:
        """From here on the UNet computes with these changes."""
        for name, layer in unet.named_modules():
            if published_name(name) in self:
                change = self[published_name(name)]
                layer.register_forward_hook(lambda _, inputs, output, change=change: output + change(inputs[0]))

    def load(self, path: Path) -> None:
        """Goes on from a file that ``save_network`` wrote."""
        self.load_state_dict(read(path))


def published_name(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")

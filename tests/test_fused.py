"""Linear layers joined into one: the same network, whatever joins them."""

import copy

import pytest
import small_sdxl as small
import torch
from torch import Tensor, nn

from fulgurite.kernels.fused import fuse, joined
from fulgurite.models import AttentionGuidance, UNet
from fulgurite.models.layers import VectorLinear


@pytest.mark.parametrize("guided", [False, True])
@torch.inference_mode()
def test_a_fused_network_is_the_plain_one(guided):
    torch.manual_seed(0)
    plain = small.roughened(UNet(small.UNET)).eval()
    fused = copy.deepcopy(plain)
    fuse(fused)
    x, timesteps, pooled = torch.randn(3, 4, 8, 12), torch.tensor([999, 500, 3]), torch.randn(3, 48)
    context, avoided = torch.randn(3, 77, 80), torch.randn(3, 77, 80)

    def predicted(unet: UNet) -> Tensor:
        guidance = AttentionGuidance(unet.read(avoided), torch.tensor([1.0, 3.0, 6.0])) if guided else None
        return unet(x, timesteps, unet.read(context), pooled, torch.full((3, 6), 512.0), guidance)

    wanted = predicted(plain)
    torch.testing.assert_close(predicted(fused), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_what_is_joined_is_there_once():
    """The layers that went into others are gone, and no weight with them."""
    plain = UNet(small.UNET)
    fused = copy.deepcopy(plain)
    fuse(fused)
    count = sum(parameter.numel() for parameter in plain.parameters())
    assert sum(parameter.numel() for parameter in fused.parameters()) == count
    linear = [sum(isinstance(layer, nn.Linear) for layer in network.modules()) for network in (plain, fused)]
    assert linear[1] < linear[0] * 0.8


@pytest.mark.parametrize("kind", [nn.Linear, VectorLinear])
@pytest.mark.parametrize("bias", [False, True])
def test_joined_layers_stand_side_by_side(kind, bias):
    layers, x = [kind(6, width, bias=bias) for width in (4, 1, 7)], torch.randn(5, 6)
    layer = joined(layers)
    assert type(layer) is kind
    torch.testing.assert_close(layer(x), torch.cat([part(x) for part in layers], dim=1))

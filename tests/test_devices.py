"""Whatever a picture is made of is on the pipeline's device, found out without a second device.

Tensors on torch's "meta" have shapes and no numbers, and in sums, stacks, norms and attention they refuse to meet those
of the CPU, as a GPU's do everywhere (in embeddings and products "meta" lets them pass).
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fulgurite import Pipeline, Request


@pytest.fixture
def elsewhere(tiny: Pipeline) -> Pipeline:
    """The tiny pipeline on another device, without numbers."""
    networks = copy.deepcopy(tiny.networks)
    for network in (*networks.text_encoders, networks.unet, networks.vae, networks.fast_decoder):
        assert isinstance(network, nn.Module)
        network.to("meta")
    return Pipeline(tiny.card, networks, "meta", torch.float16)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("distilled", [False, True])
def test_rows_guided_and_not_are_drawn_where_the_networks_are(
    elsewhere: Pipeline, fused: bool, distilled: bool
) -> None:
    elsewhere.card = replace(elsewhere.card, schedules=(2,) if distilled else ())
    for network in (elsewhere.networks.unet, elsewhere.networks.vae, *elsewhere.networks.text_encoders):
        network.half()
    if fused:
        elsewhere.accelerate()
    requests = Request("a fox", num_steps=2, seed=1), Request("a fox", negative_prompt="snow", num_steps=2, seed=2)
    rows = [elsewhere.start(request, elsewhere.encode) for request in requests]
    for _ in range(2):
        elsewhere.step(rows, batch=4)
    for row in rows:
        assert row.x.device.type == "meta"
        assert elsewhere._decoded(row.x[None], "full").shape == (1, 3, *row.plan.drawn_size[::-1])

"""Grad-CAM: which part of a photo a class score depends on."""

import captum.attr
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from PIL import Image


def grad_cam(net: torch.nn.Module, pixels: torch.Tensor, target: int) -> np.ndarray | None:
    """Return how much each place of `pixels` [3, H, W] counts for class `target`: a map [H, W] from 0 to 1.

    None if the last feature stage does not return [C, h, w], as in a vision transformer.
    """
    try:
        stage = net.feature_info[-1]
        layer, channels = net.get_submodule(stage["module"]), stage["num_chs"]
    except (AttributeError, IndexError, KeyError, TypeError):  # timm does not guarantee feature_info
        return None
    shapes = [()]

    def note_shape(_layer: torch.nn.Module, _inputs: tuple, output: object) -> None:
        shapes.append(getattr(output, "shape", ()))  # HRNet's is a list of maps

    with layer.register_forward_hook(note_shape), torch.no_grad():
        net(pixels[None])
    if len(shapes[-1]) != 4 or shapes[-1][1] != channels:
        return None
    heat = captum.attr.LayerGradCam(net, layer).attribute(pixels[None], target, relu_attributions=True)
    heat = F.interpolate(heat.detach().float(), pixels.shape[1:], mode="bilinear")[0, 0].cpu().numpy()
    return heat / max(heat.max(), np.finfo(np.float32).tiny)


def overlay(pixels: torch.Tensor, heat: np.ndarray, data_config: dict) -> Image.Image:
    """Return the network's input as an image, coloured by the map."""
    mean, std = (np.array(data_config[name])[:, None, None] for name in ("mean", "std"))
    seen = (pixels.cpu().numpy() * std + mean).clip(0, 1).transpose(1, 2, 0)
    colours = matplotlib.colormaps["turbo"](heat)[..., :3]
    strength = 0.65 * heat[..., None] ** 0.7
    return Image.fromarray((255 * (seen * (1 - strength) + colours * strength)).astype(np.uint8))

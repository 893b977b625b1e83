"""A network with a new output layer, its preprocessing and its class names."""

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator

import timm
import torch
from timm.models import group_parameters

from hotdog_hf.errors import UserError


class Float32Linear(torch.nn.Linear):
    """A linear layer that computes in float32 under autocast too.

    An output layer is a small part of the work, and bf16 logits have only 3 digits.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 [N, classes], of features [N, D] in any precision."""
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())

    def _get_name(self) -> str:
        return "Linear"


def require_linear_head(source: torch.nn.Module) -> None:
    """Raise `UserError` for a network whose output layer is not one linear layer."""
    if not isinstance(source.get_classifier(), torch.nn.Linear):
        kind = type(source.get_classifier()).__name__
        raise UserError(f"this model's classifier is a {kind}, not one linear layer; choose another --model")


def replace_head(
    source: torch.nn.Module, label_names: list[str], data_config: dict, head_init: str = "xavier"
) -> torch.nn.Module:
    """Turn the source into the chapter's target model: its body, and one new linear layer for our classes.

    "xavier" initialises the weight by Xavier uniform and leaves the bias to `nn.Linear` (Dive into Deep
    Learning, section 14.2); "linear" leaves both to it. A saved model of the same classes keeps its head.
    The layer computes in float32. The model then carries `data_config` and the names.
    """
    require_linear_head(source)
    in_features = source.get_classifier().in_features
    if source.pretrained_cfg.get("label_names") != label_names:
        source.reset_classifier(len(label_names))
        head = source.get_classifier()
        assert head.in_features == in_features
        torch.nn.Linear.reset_parameters(head)  # timm's models differ in how they initialise it
        if head_init == "xavier":
            torch.nn.init.xavier_uniform_(head.weight)
    source.get_classifier().__class__ = Float32Linear
    source.pretrained_cfg = (
        source.pretrained_cfg
        | data_config
        | {
            "num_classes": len(label_names),
            "label_names": list(label_names),
        }
    )
    return source


def depths(net: torch.nn.Module) -> dict[str, int]:
    """Return the depth of every parameter of a timm model by name: 0 is the stem, the next 1, and so on."""
    return group_parameters(net, net.group_matcher(coarse=True), reverse=True)


def freeze_body(net: torch.nn.Module) -> None:
    """Make only the output layer trainable."""
    net.requires_grad_(False)
    net.get_classifier().requires_grad_(True)


def freeze_lowest(net: torch.nn.Module, share: float) -> None:
    """Make a share of the body's depths, from the stem on and rounded up, not trainable."""
    head, depth_of = {id(parameter) for parameter in net.get_classifier().parameters()}, depths(net)
    body = {name: parameter for name, parameter in net.named_parameters() if id(parameter) not in head}
    found = sorted({depth_of[name] for name in body})
    frozen = found[: math.ceil(share * len(found))]
    for name, parameter in body.items():
        parameter.requires_grad_(depth_of[name] not in frozen)


def modules_in_eval_mode(net: torch.nn.Module, *, body: bool, batch_norm: bool) -> list[torch.nn.Module]:
    """Return the modules to keep in evaluation mode: the whole body, or its BatchNorm layers.

    Such BatchNorm layers use the source's statistics and do not update them; their scales and shifts are
    trained if they are not frozen. Frozen BatchNorm layers are always among them.
    """
    if body:
        return [net]  # a linear output layer is the same in both modes
    kinds = torch.nn.modules.batchnorm._BatchNorm
    layers = [module for module in net.modules() if isinstance(module, kinds)]
    return [layer for layer in layers if batch_norm or (layer.affine and not layer.weight.requires_grad)]


@contextlib.contextmanager
def single_photo(net: torch.nn.Module) -> Iterator[None]:
    """Let a network in training take a batch of one photo.

    A BatchNorm layer behind a pooling sees one value per channel then, which has no deviation: such a layer
    uses its running statistics for this batch, and does not update them. The others work as always.
    """
    kinds, alone = torch.nn.modules.batchnorm._BatchNorm, []

    def use_running_statistics(layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            alone.append(layer.eval())

    layers = [module for module in net.modules() if isinstance(module, kinds) and module.training]
    hooks = [layer.register_forward_pre_hook(use_running_statistics) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in alone:
            layer.train()


class Mirrored(torch.nn.Module):
    """A network that sees every image in the mirror."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the network's output for the mirror images of [N, 3, H, W]."""
        return self.net(images.flip(-1))


def to_meta(net: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a network on the meta device: all that saving needs besides the weights."""
    tensors = itertools.chain(net.parameters(), net.buffers())
    return copy.deepcopy(net, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors})


def data_config_of(model: torch.nn.Module) -> dict:
    """Return the preprocessing of a model: input_size, interpolation, mean, std, crop_pct, crop_mode."""
    config = timm.data.resolve_model_data_config(model)
    # A loaded config.json has lists where timm's own configs have tuples.
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}


def label_names_of(model: torch.nn.Module) -> list[str]:
    """Return the class names of a model, in the order of its outputs."""
    return list(model.pretrained_cfg["label_names"])


class NoFeaturesError(UserError):
    """The network has more than one layer after the features that its output layer takes."""


def forward_with_features(net: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [N, classes] of images [N, 3, H, W], and the input of the output layer [N, D].

    Raises `NoFeaturesError` if the network's output is not that of its output layer.
    """
    passed: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = net.get_classifier().register_forward_hook(
        lambda _, inputs, output: passed.append((inputs[0], output))
    )
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would not call the hook
            logits = net(images)
    finally:
        hook.remove()
    # Another thread's passes through the same network are there as well.
    found = [features for features, output in passed if output is logits]
    found = found or [features for features, output in passed if torch.equal(output, logits)]
    if len(found) != 1:
        raise NoFeaturesError("this model has more than one linear layer after its features; choose another")
    return logits, found[0].float()


def describe_head(model: torch.nn.Module) -> str:
    """Return the classifier as the chapter prints it: `Linear(in_features=512, out_features=1000, ...)`."""
    return repr(model.get_classifier())

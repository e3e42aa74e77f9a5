"""Stage 0, for a backbone that nobody has pretrained: it learns the tags of whole images before the cascade starts.

Not in the paper, whose networks start from ImageNet weights. The supervision is the same: tags, nothing else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelpenet.engine.sampler import seed_step
from labelpenet.engine.stage import Stage
from labelpenet.models.backbones import Backbone
from labelpenet.models.classification import present_classes
from labelpenet.training.pretrain import Sample, Training, load_samples

NAME = "warmup"
TOGETHER = 4  # images that go through the network at a time: twice as fast as one by one


class ImageClassifier(nn.Module):
    """A network, the average of its map over the image, and a linear layer.

    Args:
        network: (N, 3, H, W) to (N, channels, h, w), with an attribute ``channels``.
        num_classes: C.
    """

    def __init__(self, network: nn.Module, num_classes: int):
        super().__init__()
        self.network = network
        self.classifier = nn.Linear(int(network.channels), num_classes)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to logits (N, C)."""
        return self.classifier(self.network(images).mean((2, 3)))


def warm_up(training: Training, backbone: Backbone) -> Backbone:
    """The backbone with its whole network trained to tell the tags of the training images; finished once, only loaded.
    Errors as `train_stage`.
    """
    assert backbone.untrained is not None
    seed_step(training.options.seed, NAME, 0)
    module = ImageClassifier(backbone.untrained, len(training.images.classes))
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(samples: list[Sample], step: int) -> dict[str, Tensor]:
        """Binary cross-entropy of each class, a mean over classes and images."""
        views = [sample.view.pixels for sample in samples]
        if len({view.shape for view in views}) == 1:  # one call where they fit together
            views = [torch.cat(views)]
        channels_last = (view.contiguous(memory_format=torch.channels_last) for view in views)
        logits = torch.cat([module(view).float() for view in channels_last])
        present = torch.stack([present_classes(sample.tags, logits.shape[1]) for sample in samples])
        return {"tags": F.binary_cross_entropy_with_logits(logits, present.to(training.fabric.device))}

    stage = Stage(
        name=NAME,
        module=module,
        schedule=training.recipe.warm_up,
        images=[image.id for image in training.images.images],
        loss=loss,
        load=load_samples(training),
        micro_batch=TOGETHER,
    )
    training.train(stage)
    return type(backbone)(module.network.cpu())  # type: ignore[call-arg]

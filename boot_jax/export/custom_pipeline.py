"""The one-file pipeline for students that no stock pipeline runs.

It is text here, because it is PyTorch's and boot_jax is not: an export carries it as
``pipeline.py``, and diffusers loads it by ``custom_pipeline`` and
``trust_remote_code=True``.
"""

MODULE_NAME, CLASS_NAME = "pipeline", "OneStepPipeline"

PIPELINE = '''\
"""One-step generation with a student that boot_jax has distilled."""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class OneStepPipeline(DiffusionPipeline):
    """Noise, one call of the network, one step of the scheduler."""

    def __init__(self, network, scheduler, num_classes=None):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)
        self.register_to_config(num_classes=num_classes)

    @torch.no_grad()
    def __call__(
        self,
        batch_size=1,
        class_labels=None,
        generator=None,
        output_type="pil",
        return_dict=True,
    ):
        """Makes images: `batch_size` of them, or one for each of `class_labels`."""
        labels = self.labels(batch_size, class_labels)
        size = self.network.config.sample_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        noise = randn_tensor(
            (len(labels), self.network.config.in_channels, *size),
            generator=generator,
            device=self._execution_device,
            dtype=self.network.dtype,
        )
        image = self.denoise(noise, labels).float()
        image = (image / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            image = self.numpy_to_pil(image)
        return ImagePipelineOutput(images=image) if return_dict else (image,)

    def denoise(self, noise, labels):
        self.scheduler.set_timesteps(1)
        time = self.scheduler.timesteps[0]
        output = self.network(
            noise,
            timestep=time.to(noise.device).expand(len(noise)),
            class_labels=labels.to(noise.device),
        ).sample
        return self.scheduler.step(output, time, noise).prev_sample

    def labels(self, batch_size, class_labels):
        num_classes = self.config.num_classes
        if num_classes is None:
            if class_labels is not None:
                raise ValueError("this student has no classes; leave out class_labels")
            return torch.zeros(batch_size, dtype=torch.long)
        if class_labels is None:
            raise ValueError(
                f"give class_labels, each from 0 to {num_classes - 1}: one an image"
            )
        labels = torch.as_tensor(class_labels).reshape(-1)
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"class_labels must be from 0 to {num_classes - 1}")
        return labels
'''

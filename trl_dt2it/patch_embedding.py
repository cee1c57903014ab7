"""The patch embedding of Qwen's and GLM's vision towers as the matrix product that it is."""

from __future__ import annotations

import torch
from torch import nn


class PatchProjection(nn.Conv3d):
    """
    A 3-D convolution that is computed as one matrix product where its input is as large as its kernel.

    Image processors of these families hand over patches that are already cut out, and the tower convolves each with
    a kernel of its own size. That is a product of two matrices, which torch does not notice: on a CPU it takes three
    times as long, and on a GPU in bf16 some releases of cuDNN take far longer.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            input (`torch.Tensor` of shape `(N, C, T, H, W)`):
                N patches.

        Returns:
            `torch.Tensor` of shape `(N, D, 1, 1, 1)`, or whatever the convolution makes of a larger input.
        """
        if input.shape[2:] != self.kernel_size:
            return super().forward(input)
        return nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def project_patches_by_matrix_product(model: nn.Module) -> None:
    """
    Makes every plain 3-D convolution of a model a [`PatchProjection`], in place. Parameters and their names stay.

    Args:
        model (`torch.nn.Module`):
            Any model.
    """
    for module in model.modules():
        # The class alone changes, and not `forward` of the instance, which may be wrapped (offloading) or be so later.
        if type(module) is nn.Conv3d and (module.groups, module.padding) == (1, (0, 0, 0)):
            module.__class__ = PatchProjection

"""The linear map of attention."""

from __future__ import annotations

from torch import nn


class Projection(nn.Linear):
    """A linear map without bias, initialised from normal(0, std).

    Initialised in the constructor, since ZeRO-3 may partition a module's weights when it returns.
    """

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, std=self.std)

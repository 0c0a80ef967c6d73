"""The PyTorch front end: layers that train and run in 8 bits, on the CPU by emulation.

model = octavo.torch.convert(model, octavo.recipes.delayed_scaling())
with octavo.torch.autocast():
    loss = criterion(model(x), y)
loss.backward()
"""

from octavo.torch.context import autocast, fp8_autocast
from octavo.torch.convert import calibrate, convert
from octavo.torch.linear import Linear

__all__ = ["Linear", "autocast", "calibrate", "convert", "fp8_autocast"]

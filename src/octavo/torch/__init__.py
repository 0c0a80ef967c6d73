"""The PyTorch front end: layers that train and run in 8 bits, and whole models that are emulated.

model = octavo.torch.convert(model, octavo.recipes.delayed_scaling())
with octavo.torch.autocast():
    loss = criterion(model(x), y)
loss.backward()

emulation = octavo.torch.emulate(model, "hybrid", loss_scale="dynamic")
emulation.scale(criterion(model(x), y)).backward()
emulation.step(optimizer)
"""

from octavo.torch.accuracy import AccuracyReport, compare_accuracy
from octavo.torch.calibration import Calibration
from octavo.torch.context import autocast, fp8_autocast
from octavo.torch.convert import calibrate, convert
from octavo.torch.emulate import Emulation, emulate, emulation_of
from octavo.torch.linear import Linear
from octavo.torch.loss_scaling import LossScaleError, LossScaler
from octavo.torch.masters import round_masters
from octavo.torch.quantization import load_quantized, ptq_recipe, quantize_model, save_quantized

__all__ = [
    "AccuracyReport",
    "Calibration",
    "Emulation",
    "Linear",
    "LossScaleError",
    "LossScaler",
    "autocast",
    "calibrate",
    "compare_accuracy",
    "convert",
    "emulate",
    "emulation_of",
    "fp8_autocast",
    "load_quantized",
    "ptq_recipe",
    "quantize_model",
    "round_masters",
    "save_quantized",
]

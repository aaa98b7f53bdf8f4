"""Training: options, the model they describe, the loop, reloading of runs, scores and metrics."""

from ifa_torchrec.errors import require

require("train", "pandas", "pyarrow", "tqdm", "tensorboard", "torchmetrics")

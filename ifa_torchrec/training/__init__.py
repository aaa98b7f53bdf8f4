"""Training: options, the model they describe, the loop, runs loaded again, scores and metrics."""

from ifa_torchrec.errors import require

require("train", "pandas", "pyarrow", "tqdm", "tensorboard", "torchmetrics")

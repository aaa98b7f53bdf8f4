"""TorchX components: ``ifa.train.ddp`` and ``ifa.evaluate.ddp``; how to run them: docs/launch."""

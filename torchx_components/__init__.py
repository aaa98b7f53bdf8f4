"""TorchX components: ``ifa.train.ddp``, ``ifa.evaluate.ddp``, ``ifa.build_states.ddp`` and
``ifa.serve.server``; how to run them: docs/launch."""

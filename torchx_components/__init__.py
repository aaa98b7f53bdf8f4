"""TorchX components: ``ifa.train.ddp``, ``ifa.evaluate.ddp``, ``ifa.build_states.ddp`` and
``ifa.serve.server``. docs/launch says how to run them."""

"""The commands of ``ifa``, one module each: options, a function that does the work, and ``main``."""

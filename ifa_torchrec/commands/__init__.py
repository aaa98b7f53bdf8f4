"""The commands of ``ifa``, a file each: options, what is done, and ``main``, which prints."""

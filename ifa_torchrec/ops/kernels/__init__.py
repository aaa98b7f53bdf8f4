"""The kernels, one file or folder per backend: plain functions that the operators of ``ops`` call.

Each backend has ``encode``, ``attend``, ``attend_softmax`` and ``match``; ``native``, ``torch`` and
``triton``, which run below autograd, also have their backwards. ``ops/checks.py`` has checked the
arguments.
"""

"""The kernels, one backend a file or folder: plain functions beneath the operators of ``ops``.

Each has ``encode``, ``attend`` and ``match``; ``native``, ``torch`` and ``triton``, which run beneath
autograd, have their backwards too. Arguments have passed ``ops/checks.py``.
"""

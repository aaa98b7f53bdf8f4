"""The kernels, one backend a file: plain functions beneath the operators of ``ifa_torchrec.ops``.

Each file has ``encode``, ``attend`` and ``match``; ``native`` and ``torch``, which run beneath autograd,
have their backwards too. Arguments have passed ``ops/checks.py``.
"""

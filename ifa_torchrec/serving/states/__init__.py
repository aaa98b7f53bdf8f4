"""User states in a key-value store.

The modules from the lowest to the highest; each imports only those before it:

- ``key_value``: bytes by key; ``lmdb_store``, ``redis_store``: the stores; ``opening``: opens one.
- ``layout``: the shape of a state, and which record is stored under which key.
- ``pages``, ``dense``, ``records``: the contents of records, and their bytes.
- ``shared``: records of all versions: forgotten users, and where the journal begins.
- ``versions``: which versions' states a store holds.
- ``journal``: events, and which positions of their stream were taken.
- ``forgetting``, ``retention``: forget a user; drop a version, and trim the journal.
- ``beginning``, ``building``, ``appending``, ``reading``: begin a build, write whole states, add events
  to states, read states; ``missing``: find the journal's events that states lack.
- ``store``: StateStore, which combines these for one version.
"""

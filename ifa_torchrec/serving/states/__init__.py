"""User states in a key-value store.

From the lowest file to the highest, each knows those before it:

- ``key_value``: bytes by key; ``lmdb_store``, ``redis_store``: where they lie; ``opening``: opens one.
- ``layout``: the shape of a state, and which record lies under which key.
- ``records``: what a record holds, and its bytes.
- ``shared``: records of all versions: who was forgotten, and from where on the journal is whole.
- ``versions``: which versions' states a store holds.
- ``journal``: events, and which positions of their stream were taken.
- ``forgetting``, ``retention``: a user forgotten; a version dropped, and the journal's old events.
- ``beginning``, ``building``, ``appending``, ``reading``: states begun, whole states written, events
  added to states, states read; ``missing``: what of the journal states have not.
- ``store``: StateStore, which is all of this for one version.
"""

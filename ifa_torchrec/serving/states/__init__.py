"""User states in a store: their layout, records, versions, and the key-value stores beneath."""

"""Public data sets as event logs, one module each."""

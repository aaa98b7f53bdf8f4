"""Public data sets as event logs, one a file."""

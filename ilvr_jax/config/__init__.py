"""The configuration of a run: a schema with every key, experiments read from files and flags, kept in workdirs."""

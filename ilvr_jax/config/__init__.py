"""The configuration of a run: a schema of all keys, experiments read from files and flags, copies in workdirs."""

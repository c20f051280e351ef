"""FrozenLake maps: generated records and drawings."""

"""FrozenLake maps: generated records and their drawings."""

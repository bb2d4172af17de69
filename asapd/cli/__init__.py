"""The commands `asapd` and `asapctl`."""

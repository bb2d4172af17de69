"""Doors: what comes in is decoded, asked of an actor, and answered. They know no store."""

"""Actors: thin loops from a mailbox through pure decisions to the store. They know each other's messages only."""

"""Units of work: frozen values that say what to write, and the values that answer them, by subject."""

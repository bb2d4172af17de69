"""Pure decisions: no clock, no chance, no input or output. One concept a module."""

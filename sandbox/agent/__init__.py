"""The agent: what a model may ask for, how it is validated, and the loop that asks it."""

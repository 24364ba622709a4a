"""The contract: what a label is, what the tables hold, and the one file that speaks to Delta."""
